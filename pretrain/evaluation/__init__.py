"""Evaluation of trained models: perplexity on held-out text, baselines, tasks, generated text."""
