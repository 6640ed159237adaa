"""Attention: projections, masks and kernels."""
