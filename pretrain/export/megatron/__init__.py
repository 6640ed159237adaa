"""Distributed checkpoints of Megatron-Core (``torch_dist``), written and read without it."""
