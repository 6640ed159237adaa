"""Megatron's own data sets over our shards: what data.order=megatron is compared with.

They import megatron.core, so callers run it in a process of its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

EOD = 0


def megatrons_dataset(
    prefixes: Sequence[Path],
    weights: Sequence[float] | None,
    num_samples: int,
    cache: Path,
    **options: Any,
) -> Any:
    """The training data set that Megatron's builder makes.

    Args:
        prefixes: of the shards of each data set.
        weights: of a blend; None for none.
        cache: folder into which Megatron writes its indices.
        options: ``random_seed``, ``sequence_length``, and more of a GPTDatasetConfig.
    """
    warnings.simplefilter("ignore")
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.megatron_tokenizer import MegatronLegacyTokenizer

    class Tokenizer(MegatronLegacyTokenizer):  # type: ignore[misc]
        vocab: dict[str, int] = {}
        inv_vocab: dict[int, str] = {}
        vocab_size, eod, pad = 1000, EOD, EOD

        def tokenize(self, text: str) -> None:
            raise NotImplementedError

    # Megatron's blending asks for this process's rank.
    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    blend = [str(prefix) for prefix in prefixes], None if weights is None else list(weights)
    flags = {"reset_position_ids": False, "reset_attention_mask": False, "eod_mask_loss": False}
    config = GPTDatasetConfig(
        blend=blend,
        path_to_cache=str(cache),
        tokenizer=Tokenizer("none"),
        **{"split": "1,0,0", **flags, **options},
    )
    builder = BlendedMegatronDatasetBuilder(GPTDataset, [num_samples, 0, 0], lambda: True, config)
    return builder.build()[0]


def sampler_batches(
    consumed: int, micro_batch_size: int, dp_rank: int, dp_size: int, micro_steps: int
) -> list[list[int]]:
    """The next micro batches of a rank as Megatron-LM's MegatronPretrainingSampler yields them.

    Written out after ``__iter__`` of megatron/legacy/data/data_samplers.py, which is in no package:
    it collects micro_batch_size * dp_size indices and gives each rank its range of them.
    """
    yielded = []
    batch: list[int] = []
    index = consumed
    while len(yielded) < micro_steps:
        batch.append(index)
        index += 1
        if len(batch) == micro_batch_size * dp_size:
            first = dp_rank * micro_batch_size
            yielded.append(batch[first : first + micro_batch_size])
            batch = []
    return yielded
