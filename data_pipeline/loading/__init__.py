"""From shards or streams to training batches."""
