"""Architectures of transformers, one a file: what they take of a recipe, how their tensors are
named, what stands in their config.
"""
