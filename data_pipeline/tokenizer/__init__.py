"""Tokenizers, always held as a ``tokenizer.json``, and fast engines with equal ids."""
