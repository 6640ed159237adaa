"""Position encodings, one kind per file."""
