"""The training loop (``trainer.py``) and its parts: schedules, clock, metrics, validation,
checkpoints, stopping.
"""
