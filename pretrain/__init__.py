"""Distributed pretraining of mixture-of-experts language models on DeepSpeed."""
