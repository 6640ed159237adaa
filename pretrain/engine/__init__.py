"""One optimizer step on DeepSpeed's engine, and what it needs around it."""
