"""Cleaning: what happens to a document between its source and the tokenizer."""
