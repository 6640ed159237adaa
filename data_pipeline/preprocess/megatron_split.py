"""Megatron's ``--split``: the first documents of a shard to train on, the next to hold out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np

from data_pipeline.shards.foreign import ForeignShard
from data_pipeline.shards.split import SPLITS, SplitName
from pretrain.core.errors import ConfigError, DataError


def parse_split(text: str) -> tuple[float, ...]:
    """Return the shares of training, validation and test; together 1.

    Args:
        text: up to three numbers with commas between them, such as "969,30,1".

    Raises:
        ConfigError: if it is none.
    """
    parts = text.split(",")
    try:
        given = [float(part) for part in parts]
    except ValueError:
        given = []
    if not 1 <= len(given) <= 3 or not all(math.isfinite(part) and part >= 0 for part in given):
        raise ConfigError(
            f"--import-split {text!r} is no split: give three numbers, such as 969,30,1"
        )
    if not given[0]:
        raise ConfigError(
            f"--import-split {text} leaves nothing to train on: raise its first number"
        )
    # Divided as numpy does it, as Megatron: a bound may be a document off otherwise.
    weights = np.array([*given, 0.0, 0.0][:3], dtype=np.float64)
    return tuple((weights / np.sum(weights)).tolist())


def document_ranges(shares: Sequence[float], documents: int) -> list[range]:
    """Return each split's documents, rounded as Megatron does."""
    bounds = [round(share * float(documents)) for share in accumulate(shares, initial=0.0)]
    return [range(begin, end) for begin, end in pairwise(bounds)]


def split_shard(
    shard: ForeignShard, shares: Sequence[float], eod_id: int | None
) -> dict[SplitName, ForeignShard]:
    """Return a shard's documents for training and validation; those of the test are left out.

    Raises:
        DataError: if Megatron would count other documents.
    """
    ends = shard.document_ends(eod_id)
    if shard.sequences not in (None, len(ends)):
        raise DataError(
            f"{shard.prefix} has {shard.sequences:,} sequences in {len(ends):,} documents, and"
            " Megatron's split counts sequences: give --import-validation instead of"
            " --import-split"
        )
    ranges = document_ranges(shares, len(ends))
    return {
        split: shard.part_of_documents(ends, part.start, part.stop)
        for split, part in zip(SPLITS, ranges, strict=False)
        if part
    }
