"""DeepSpeed's engine, driven step by step: processes, precision, ds_config, training step, expert
tables.
"""
