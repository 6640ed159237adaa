"""How many samples one pass over the training split has, without opening a loader."""

from __future__ import annotations

from data_pipeline.config import DataConfig
from data_pipeline.loading.best_fit import pack_shard, read_statistics
from data_pipeline.shards.datasets import Datasets
from data_pipeline.shards.token_stream import Shard, TokenStream

# By checksum of a shard's index and length: all points of a sweep ask for the same ones.
_counted: dict[tuple[str, int], int] = {}


def epoch_samples(datasets: Datasets, config: DataConfig, sequence_length: int) -> int:
    """Return the samples of all sources together: what :meth:`Loader.epochs` counts as one.

    Args:
        sequence_length: of a sample, which is the run's longest sequence.

    Raises:
        DataError: if a folder has nothing to train on.
    """
    sources = datasets.training_shards()
    if config.order.is_megatrons:
        # A source is one stream of tokens there, whatever folders its shards are in.
        return sum(
            max(sum(part.stream.num_tokens for part in parts) - 1, 0) // sequence_length
            for parts in sources.values()
        )
    streams = [part.stream for parts in sources.values() for part in parts]
    count = _packed if config.packing.is_planned else _windows
    return sum(count(stream, sequence_length) for stream in streams)


def _windows(stream: TokenStream, sequence_length: int) -> int:
    # A window's last target is the first input of the next one, so one token is no input.
    return max(stream.num_tokens - 1, 0) // sequence_length


def _packed(stream: TokenStream, sequence_length: int) -> int:
    total = 0
    for shard in stream.shards:
        # What is not packed yet is packed in memory: only one process may write it.
        found = read_statistics(shard, sequence_length)
        total += _packed_now(shard, sequence_length) if found is None else found.sequences
    return total


def _packed_now(shard: Shard, sequence_length: int) -> int:
    """The sequences of a shard that has to be packed for it: once a process."""
    key = shard.entry.idx_sha256, sequence_length
    if key not in _counted:
        _counted[key] = pack_shard(shard.open(), sequence_length).statistics.sequences
    return _counted[key]
