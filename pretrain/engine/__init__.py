"""The only place that calls DeepSpeed's engine: start of the processes, ds_config, training step."""
