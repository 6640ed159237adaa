"""The order of samples of Megatron-LM's GPTDataset and BlendedDataset (megatron-core 0.16)."""
