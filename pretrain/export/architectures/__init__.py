"""Architectures of transformers, one a file: which recipes they support, tensor names, config fields."""
