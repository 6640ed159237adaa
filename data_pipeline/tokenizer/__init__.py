"""Tokenizers: loaded from several formats or trained, always held as a ``tokenizer.json``; and fast
engines with equal ids.
"""
