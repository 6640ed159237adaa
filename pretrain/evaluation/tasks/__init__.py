"""Benchmarks: the lm-evaluation-harness and executed code."""
