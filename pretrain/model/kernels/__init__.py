"""Fused kernels in Triton for CUDA, each with a plain form that CPUs run, and their selection."""
