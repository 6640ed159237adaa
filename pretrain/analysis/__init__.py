"""Measurements of a model: coordinate checks and expert usage."""
