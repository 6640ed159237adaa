"""From raw files to training batches: documents, tokenizer, shards, sample order, loader.

Only :mod:`data_pipeline.loading` imports torch.
"""
