"""Attention kernels, one a file."""
