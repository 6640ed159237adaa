"""From raw files to training batches: documents, split, tokenizer, shards in Megatron's format,
manifest, sample order, loader.

Only :mod:`data_pipeline.loading.shard_loader` imports torch.
"""
