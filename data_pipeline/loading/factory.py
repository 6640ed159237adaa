"""The loader that a recipe's data section asks for."""

from __future__ import annotations

from data_pipeline.config import DataConfig
from data_pipeline.loading.interface import Loader
from data_pipeline.loading.megatron.loader import open_megatron_loader
from data_pipeline.loading.megatron.order import plan_order, prepare_order
from data_pipeline.loading.packing import prepare_packing
from data_pipeline.loading.plan import LoaderPlan
from data_pipeline.loading.shard_loader import open_shard_loader
from data_pipeline.loading.stream_loader import StreamLoader
from data_pipeline.shards.datasets import Datasets


def open_loader(
    data: DataConfig, datasets: Datasets, plan: LoaderPlan, dp_rank: int, dp_size: int
) -> Loader:
    """The training batches of one rank, from shards or from the sources themselves.

    Raises:
        ConfigError: if the batch sizes or the mixture do not fit the ranks or the data.
        DataError: if there is too little data.
    """
    if data.streaming:
        return StreamLoader(data, datasets, plan, dp_rank, dp_size)
    if data.order.is_megatrons:
        return open_megatron_loader(data, datasets, plan, dp_rank, dp_size)
    return open_shard_loader(data, datasets, plan, dp_rank, dp_size)


def prepare_files(data: DataConfig, datasets: Datasets, plan: LoaderPlan) -> None:
    """Write the files that a loader reads next to the shards, on one process, showing progress.

    Raises:
        ConfigError: if the mixture does not fit the order.
        StorageError: if a packing cannot be written.
    """
    prepare_packing(datasets, data, plan.sequence_length, progress=True)
    if data.order.is_megatrons:
        prepare_order(plan_order(data, datasets, plan), progress=True)
