"""The order of a whole run in Megatron's terms: a GPTDataset, or a BlendedDataset of several.

As in Megatron, a mixture without weights of several sources reads each of them once at most, and
one with weights repeats them as often as it needs to. A source is one data set, its shards one
after the other, as Megatron's ``tools/merge_datasets.py`` would join them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.config import DataConfig, MegatronOrder, Weights
from data_pipeline.loading.megatron.blend import (
    MOST_DATA_SETS,
    BlendIndices,
    build_blend,
    normalized,
    sizes_of_blend,
)
from data_pipeline.loading.megatron.files import FOLDER, IndexFiles
from data_pipeline.loading.megatron.index import (
    SEEDS,
    Advance,
    EpochPlan,
    SampleIndices,
    build_indices,
    num_entries,
    plan_epochs,
)
from data_pipeline.loading.plan import LoaderPlan
from data_pipeline.shards.datasets import Datasets, SourceShards
from data_pipeline.shards.indexed import idx_path
from data_pipeline.shards.manifest import canonical_sha256
from data_pipeline.shards.token_stream import TokenStream
from pretrain.core.errors import ConfigError, DataError, StorageError
from pretrain.core.progress import Stage

LARGEST_INT32 = np.iinfo(np.int32).max


@dataclass(frozen=True)
class PlannedSource:
    """One data set of the order.

    Attributes:
        fingerprint: of its data.
        num_samples: that are asked for; None for those of one epoch.
    """

    name: str
    stream: TokenStream
    fingerprint: str
    num_samples: int | None
    epochs: EpochPlan

    def files(self, folder: Path, sequence_length: int, seed: int) -> IndexFiles:
        """Return the files of its indices."""
        entries = self.stream.num_documents * self.epochs.epochs
        samples = self.epochs.samples
        wide = entries > LARGEST_INT32
        long = samples >= np.iinfo(np.uint32).max - 1
        return IndexFiles(
            folder,
            "GPTDataset",
            {
                "data": self.fingerprint,
                "num_samples": self.num_samples,
                "random_seed": seed,
                "sequence_length": sequence_length,
            },
            {
                "document_index": (np.dtype(np.int32), (entries,)),
                "sample_index": (np.dtype(np.int64 if wide else np.int32), (samples + 1, 2)),
                "shuffle_index": (np.dtype(np.int64 if long else np.uint32), (samples,)),
            },
        )


@dataclass(frozen=True)
class PlannedBlend:
    """What the indices of a BlendedDataset follow from: weights of the data sets, and its size."""

    weights: tuple[float, ...]
    size: int

    def files(self, folder: Path) -> IndexFiles:
        """Return the files of its indices."""
        return IndexFiles(
            folder,
            "BlendedDataset",
            {"weights": list(self.weights), "size": self.size},
            {
                "dataset_index": (np.dtype(np.int16), (self.size,)),
                "dataset_sample_index": (np.dtype(np.int64), (self.size,)),
            },
        )


@dataclass(frozen=True)
class OrderPlan:
    """All that an order follows from; nothing of the shards has been read yet.

    Attributes:
        sources: in the order of the mixture, without those of weight 0.
        blend: None if the run reads a single source without weights.
        asked_samples: that the order is made for; it may have more.
        shares: the normalized weights; None without weights.
        surplus: see :func:`sizes_of_blend`.
        folder: of the files of the indices.
    """

    sources: tuple[PlannedSource, ...]
    blend: PlannedBlend | None
    asked_samples: int
    shares: tuple[float, ...] | None
    surplus: float
    sequence_length: int
    seed: int
    folder: Path

    @property
    def num_samples(self) -> int:
        """Samples of the order."""
        return self.sources[0].epochs.samples if self.blend is None else self.blend.size

    @property
    def epoch_samples(self) -> int:
        """Samples of one pass over every source."""
        return sum(
            plan_epochs(source.stream.num_tokens, self.sequence_length, None).samples
            for source in self.sources
        )


@dataclass(frozen=True)
class Order:
    """The indices of a plan: of each source, and of the blend."""

    plan: OrderPlan
    indices: Sequence[SampleIndices]
    blend: BlendIndices | None

    def samples(self, numbers: np.ndarray) -> list[tuple[str, int]]:
        """Return the source, and the sample of it, of these samples of the order."""
        names = [source.name for source in self.plan.sources]
        if self.blend is None:
            return [(names[0], number) for number in numbers.tolist()]
        sources, samples = self.blend.sources[numbers], self.blend.samples[numbers]
        if sources.size and not 0 <= int(sources.min()) <= int(sources.max()) < len(names):
            raise DataError(
                f"the index of the blend in {self.plan.folder} is damaged: remove that folder, and"
                " the next start builds it again"
            )
        return [
            (names[source], sample)
            for source, sample in zip(sources.tolist(), samples.tolist(), strict=True)
        ]

    def taken(self, count: int) -> dict[str, int]:
        """Return how many of the first ``count`` samples are of each source."""
        names = [source.name for source in self.plan.sources]
        if self.blend is None:
            return {names[0]: count}
        counts = np.bincount(self.blend.sources[:count], minlength=len(names))
        return dict(zip(names, counts.tolist(), strict=True))


def plan_order(data: DataConfig, datasets: Datasets, plan: LoaderPlan) -> OrderPlan:
    """Return the order of a run.

    Raises:
        ConfigError: for a seed or a mixture that Megatron does not take.
        DataError: if a source is shorter than a sample.
    """
    order = data.order
    assert isinstance(order, MegatronOrder)
    if plan.seed not in SEEDS:
        raise ConfigError(
            f"seed ({plan.seed}) is none that Megatron takes: data.order=megatron needs one from 0"
            f" to {SEEDS[-1]}"
        )
    asked = plan.num_samples if order.samples is None else order.samples
    parts = datasets.training_shards()
    given = data.mixture.weights if isinstance(data.mixture, Weights) else None
    names = [name for name in parts if given is None or given.get(name)]
    if len(names) > MOST_DATA_SETS:
        raise ConfigError(
            f"data.order=megatron blends at most {MOST_DATA_SETS} sources, and these data have"
            f" {len(names)}: join some of them"
        )
    shares = None if given is None else normalized([given[name] for name in names])
    of_each: Sequence[int | None] = [asked if len(names) == 1 else None] * len(names)
    if shares is not None:
        used, of_each = sizes_of_blend(shares, asked, order.surplus)
    sources = tuple(
        _planned_source(name, parts[name], datasets, plan.sequence_length, count)
        for name, count in zip(names, of_each, strict=True)
    )
    blend = None
    if shares is not None:
        blend = PlannedBlend(tuple(shares), sum(used))
    elif len(sources) > 1:
        lengths = [source.epochs.samples for source in sources]
        # Megatron divides these by their sum, as it does with weights.
        blend = PlannedBlend(tuple(map(float, lengths)), min(asked, sum(lengths)))
    return OrderPlan(
        sources,
        blend,
        asked,
        None if shares is None else tuple(shares),
        order.surplus,
        plan.sequence_length,
        plan.seed,
        datasets.first.folder / FOLDER,
    )


def _planned_source(
    name: str,
    parts: Sequence[SourceShards],
    datasets: Datasets,
    sequence_length: int,
    num_samples: int | None,
) -> PlannedSource:
    shards = [shard for part in parts for shard in part.stream.shards]
    stream = TokenStream(shards, datasets.tokenizer.vocab_size)
    if stream.num_tokens <= sequence_length:
        raise DataError(
            f"the source '{name}' is shorter than one sample of {sequence_length} tokens: add data"
            " to it or leave it out"
        )
    fingerprint = canonical_sha256({"parts": [part.fingerprint for part in parts]})
    epochs = plan_epochs(stream.num_tokens, sequence_length, num_samples)
    return PlannedSource(name, stream, fingerprint, num_samples, epochs)


def open_order(plan: OrderPlan) -> Order:
    """Return the order from its files; what they do not hold is built, in memory.

    Raises:
        ConfigError: if Megatron refuses the blend.
        DataError: if the shards are damaged.
    """
    return _open(plan, lambda count: None, saves=False)


def prepare_order(plan: OrderPlan, progress: bool = False) -> None:
    """Build the files of an order, unless they are there and whole, on one process.

    A folder that cannot be written to is a warning: then every rank builds them in its memory.
    """
    missing = [
        source
        for source in plan.sources
        if not source.files(plan.folder, plan.sequence_length, plan.seed).are_whole()
    ]
    total = sum(num_entries(source.stream.num_documents, source.epochs) for source in missing)
    blend_is_missing = plan.blend is not None and not plan.blend.files(plan.folder).are_whole()
    if plan.blend is not None and blend_is_missing:
        total += plan.blend.size
    if not total:
        return
    with Stage("building Megatron's order", progress, total, "number") as stage:
        for source in missing:
            _remove(source.files(plan.folder, plan.sequence_length, plan.seed))
        if plan.blend is not None and blend_is_missing:
            _remove(plan.blend.files(plan.folder))
        _open(plan, stage.advance, saves=True)


def _remove(files: IndexFiles) -> None:
    """Remove what there is of files that are not whole, so that no rank reads it."""
    for name in (*(f"{name}.npy" for name in files.expected), "description.txt"):
        if not files.path(name).exists():
            continue
        try:
            files.path(name).unlink()
        except OSError as error:
            raise StorageError(
                f"{files.path(name)} is damaged and cannot be removed ({error.strerror}): remove"
                " it, and the next start builds it again"
            ) from None


def _open(plan: OrderPlan, advance: Advance, saves: bool) -> Order:
    indices = []
    for source in plan.sources:
        files = source.files(plan.folder, plan.sequence_length, plan.seed)
        found = files.load()
        if found is None:
            built = build_indices(
                _lengths(source.stream),
                range(source.stream.num_documents),
                plan.sequence_length,
                source.num_samples,
                plan.seed,
                advance,
            )
            found = {
                "document_index": built.documents,
                "sample_index": built.samples,
                "shuffle_index": built.shuffle,
            }
            if saves:
                saves = _saved(files, found)
        indices.append(
            SampleIndices(found["document_index"], found["sample_index"], found["shuffle_index"])
        )
    return Order(plan, indices, None if plan.blend is None else _open_blend(plan, advance, saves))


def _open_blend(plan: OrderPlan, advance: Advance, saves: bool) -> BlendIndices:
    assert plan.blend is not None
    files = plan.blend.files(plan.folder)
    found = files.load()
    if found is None:
        built = build_blend(plan.blend.weights, plan.blend.size, advance)
        _check_blend(plan, built)
        found = {"dataset_index": built.sources, "dataset_sample_index": built.samples}
        if saves:
            _saved(files, found)
    return BlendIndices(found["dataset_index"], found["dataset_sample_index"])


def _saved(files: IndexFiles, arrays: Mapping[str, np.ndarray]) -> bool:
    try:
        files.save(arrays)
    except OSError as error:
        print(
            f"warning: cannot write {files.folder} ({error.strerror}), where data.order=megatron"
            " keeps its indices: every rank builds them in its memory, at each start",
            file=sys.stderr,
        )
        return False
    return True


def _lengths(stream: TokenStream) -> np.ndarray:
    """Return the tokens of every document: int32."""
    found = []
    for shard in stream.shards:
        lengths = shard.open().sequence_lengths
        if len(lengths) != shard.entry.documents:
            raise DataError(
                f"{idx_path(shard.prefix)} has {len(lengths)} documents, its manifest says"
                f" {shard.entry.documents}: build the data again with tools/preprocess_data.py"
                " --fresh"
            )
        found.append(lengths)
    return np.concatenate(found)


def _check_blend(plan: OrderPlan, blend: BlendIndices) -> None:
    """Refuse a blend that asks a source for more samples than were made of it, as Megatron does."""
    taken = np.bincount(blend.sources, minlength=len(plan.sources)).tolist()
    for source, count in zip(plan.sources, taken, strict=True):
        if count > source.epochs.samples:
            raise ConfigError(
                f"the blend takes {count} samples of '{source.name}', and {source.epochs.samples}"
                " are made of it, which Megatron refuses too: raise data.order.surplus"
            )
