"""Checkpoints: layout, atomic publishing, verification, weights that need no DeepSpeed to read."""
