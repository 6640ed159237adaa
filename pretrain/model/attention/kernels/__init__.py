"""Attention kernels, one per file."""
