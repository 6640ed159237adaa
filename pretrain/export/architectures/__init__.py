"""Architectures of transformers, one a file: supported recipes, tensor names, config fields."""
