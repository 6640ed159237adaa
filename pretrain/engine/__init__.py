"""DeepSpeed's engine, driven step by step."""
