"""The training loop (``trainer.py``) and its parts."""
