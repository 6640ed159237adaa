"""Optimizers, their sections of a recipe, and parameter groups."""
