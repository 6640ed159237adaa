"""A held-out split as a model reads it: sliding windows, and the document of each target."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from data_pipeline.loading.batch import NO_LOSS, Sample
from data_pipeline.loading.packing import PADDING_WINDOW, Windows
from data_pipeline.shards.datasets import Datasets
from data_pipeline.shards.split import SplitName
from data_pipeline.shards.token_stream import TokenStream
from data_pipeline.tokenizer.config import TokenPolicy
from data_pipeline.tokenizer.tokenizer import load_tokenizer
from pretrain.core.errors import ConfigError

# Lengths in tokens at which a group of documents ends and the next one begins.
LENGTH_EDGES = (128, 512, 2048, 8192)


class SlidingWindows(Windows):
    """Windows of S inputs, ``stride`` tokens apart; each scores only targets of no earlier one.

    So every target but those of the first window has at least S - stride tokens of context. With
    ``stride`` = S they are plain windows.

    Args:
        section: the stream is a sample: sections of this many tokens that do not follow each other,
            with a window at the beginning of each.

    Raises:
        ConfigError: if the stride is not from 1 to S, because targets would be left out.
    """

    def __init__(
        self,
        stream: TokenStream,
        sequence_length: int,
        stride: int,
        pad_id: int,
        document_mask: bool = False,
        section: int | None = None,
    ) -> None:
        super().__init__(stream, sequence_length, pad_id, document_mask)
        if not 1 <= stride <= sequence_length:
            raise ConfigError(
                f"the stride is {stride} tokens with windows of {sequence_length}: give one from 1"
                " to the window's size"
            )
        self.stride = stride
        self.is_sample = section is not None
        # Tokens from the beginning of a window to that of the next one.
        self.step = section or stride
        # Negative floor division rounds up: the last window may be partly empty.
        self.num_all = (
            1 + max(0, -(-(self._targets - sequence_length) // self.step)) if self._targets else 0
        )

    def read(self, number: int) -> Sample:
        """One window, whose labels that an earlier one has scored are -100."""
        if number == PADDING_WINDOW:
            return super().read(number)
        if not 0 <= number < self.num_all:
            raise IndexError(f"window {number} of {self.num_all}")
        sample = self.read_at(number * self.step)
        if number:
            # The overlap with the window before: it has scored these targets already.
            sample.labels_S[: self.sequence_length - self.stride] = NO_LOSS
        return sample


class TokensInMemory(TokenStream):
    """A stream over the tokens of documents in memory."""

    def __init__(self, documents: Sequence[np.ndarray], vocab_size: int) -> None:
        super().__init__([], vocab_size)
        self._tokens = np.concatenate([np.zeros(0, np.int64), *documents])
        self._document_starts = np.cumsum([0, *map(len, documents)], dtype=np.int64)[:-1]

    @property
    def num_tokens(self) -> int:
        return len(self._tokens)

    def read(self, start: int, count: int) -> np.ndarray:
        return self._tokens[start : start + count]

    def document_starts(self, start: int, count: int) -> np.ndarray:
        first, last = np.searchsorted(self._document_starts, [start, start + count])
        return self._document_starts[first:last] - start


@dataclass(frozen=True)
class HeldoutText:
    """A split's tokens and its D documents.

    Attributes:
        starts_D: the first token of each document, int64.
        sources: names; ``source_D`` has an index into them for each document.
        utf8_bytes: of all texts, from the data's manifest.
        texts: reads the documents' texts, in order.
        corpora: the data folders whose tokens these are; None for tokens of another model.
        section: see :class:`SlidingWindows`; None for the whole text.
        whole_lengths_D: tokens of each whole document, if ``stream`` has only parts of them.
    """

    stream: TokenStream
    starts_D: np.ndarray
    sources: list[str]
    source_D: np.ndarray
    utf8_bytes: int
    texts: Callable[[], Iterator[str]]
    datasets: Datasets | None = None
    section: int | None = None
    whole_lengths_D: np.ndarray | None = None

    def lengths_D(self) -> np.ndarray:
        """Tokens of each document."""
        if self.whole_lengths_D is not None:
            return self.whole_lengths_D
        # Documents follow each other without gaps.
        return np.diff(self.starts_D, append=self.stream.num_tokens)

    def bytes_D(self) -> np.ndarray:
        """UTF-8 bytes of each document, by decoding all of them."""
        return np.array([len(text.encode("utf-8")) for text in self.texts()], dtype=np.int64)


def read_split(datasets: Datasets, split: SplitName) -> HeldoutText:
    """A split of the data folders.

    Raises:
        DataError: if no folder has it.
    """
    stream = datasets.stream(split)
    labels = [
        f"{corpus}/{entry.source}" if corpus else entry.source
        for corpus, manifest in datasets.manifests.items()
        if split in manifest.splits
        for entry in manifest.splits[split].shards
    ]
    starts_D = stream.document_starts(0, stream.num_tokens)
    begins = np.array([stream.start_of(number) for number in range(len(labels))])
    # Shards without tokens begin where the next one does: the last of those that begin there holds
    # the document.
    # side="right": a document that begins with its shard belongs to that shard.
    shard_D = np.searchsorted(begins, starts_D, side="right") - 1
    sources = list(dict.fromkeys(labels))
    source_D = np.array([sources.index(label) for label in labels])[shard_D]

    def texts() -> Iterator[str]:
        return _decoded(stream, starts_D, datasets)

    return HeldoutText(
        stream, starts_D, sources, source_D, datasets.utf8_bytes(split), texts, datasets
    )


def _decoded(stream: TokenStream, starts_D: np.ndarray, datasets: Datasets) -> Iterator[str]:
    """Each document's text, without the tokens around it."""
    decode = document_decoder(datasets)
    ends_D = np.append(starts_D[1:], stream.num_tokens)
    for start, end in tqdm(
        zip(starts_D.tolist(), ends_D.tolist(), strict=True),
        total=len(starts_D),
        desc="decoding documents",
        unit="document",
    ):
        yield decode(stream.read(start, end - start))


def document_decoder(datasets: Datasets) -> Callable[[np.ndarray], str]:
    """Decodes a document's tokens, or a part of them, without the tokens around a document."""
    policy = datasets.tokenizer
    tokenizer = load_tokenizer(datasets.tokenizer_path, TokenPolicy(append_eod=False))

    def decode(ids: np.ndarray) -> str:
        if policy.prepend_bos and len(ids) and ids[0] == policy.bos_id:
            ids = ids[1:]
        if policy.append_eod and len(ids) and ids[-1] == policy.eod_id:
            ids = ids[:-1]
        return tokenizer.decode(ids.tolist())

    return decode


class Groups:
    """Sums over targets, by source and by length of the document that a target is in."""

    def __init__(self, text: HeldoutText) -> None:
        self.text = text
        self._lengths_D = text.lengths_D()
        edges = (0, *LENGTH_EDGES)
        self.length_names = [f"{low} to {high - 1}" for low, high in itertools.pairwise(edges)] + [
            f"{edges[-1]} and more"
        ]
        self._length_D = np.searchsorted(LENGTH_EDGES, self._lengths_D, side="right")
        shape = len(text.sources), len(self.length_names)
        self._nats, self._targets, self._correct = (
            np.zeros(shape),
            np.zeros(shape, np.int64),
            np.zeros(shape, np.int64),
        )

    def add(self, places_P: np.ndarray, nats_P: np.ndarray, correct_P: np.ndarray) -> None:
        """Adds targets at ``places_P`` of the stream."""
        document_P = np.searchsorted(self.text.starts_D, places_P, side="right") - 1
        where = self.text.source_D[document_P], self._length_D[document_P]
        np.add.at(self._nats, where, nats_P)
        np.add.at(self._targets, where, 1)
        np.add.at(self._correct, where, correct_P)

    def totals(self) -> tuple[float, int, int]:
        """Nats, targets and correct ones of all groups together."""
        return float(self._nats.sum()), int(self._targets.sum()), int(self._correct.sum())

    def by(
        self, kind: str, bytes_D: np.ndarray | None
    ) -> dict[str, tuple[float, int, int, int | None]]:
        """Nats, targets, correct ones and bytes of each group that has targets.

        ``kind`` is "source" or "length".
        """
        names, axis, group_D = {
            "source": (self.text.sources, 1, self.text.source_D),
            "length": (self.length_names, 0, self._length_D),
        }[kind]
        sums = [
            column.sum(axis=axis).tolist() for column in (self._nats, self._targets, self._correct)
        ]
        sizes = (
            [None] * len(names)
            if bytes_D is None
            else np.bincount(group_D, weights=bytes_D, minlength=len(names)).astype(int).tolist()
        )
        totals = zip(names, *sums, sizes, strict=True)
        return {name: row for name, *row in totals if row[1]}  # type: ignore[misc]
