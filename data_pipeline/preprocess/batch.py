"""Documents on their way to the engine, and their tokens on the way to a file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from data_pipeline.tokenizer.engine_choice import CheckedEncoder
from pretrain.core.errors import DataError

# Tokens of a document up to which a mask over all tokens is faster than a slice a document.
FEW_TOKENS = 256

Tokens = np.ndarray[tuple[int], np.dtype[Any]]


class Batch:
    """Documents, each a text, or segments if it is long or transformed.

    A segment is a text, or a literal token id around or between texts. Nothing is made for a
    document but entries of lists: most corpora are short records by number.

    Args:
        before, after: ids around every document.

    Attributes:
        sides: of each document, the index of its split.
    """

    def __init__(self, before: Sequence[int], after: Sequence[int]) -> None:
        self.sides: list[int] = []
        self._before = before
        self._after = after
        self._names: list[str] = []
        self._digests: list[int] = []
        self._documents: list[str | list[str | int]] = []
        self._all_are_texts = True

    def add(self, name: str, digest: int, side: int, document: str | list[str | int]) -> None:
        """Add a document, without the ids around it."""
        self._documents.append(document)
        self.sides.append(side)
        self._names.append(name)
        self._digests.append(digest)
        if type(document) is list:
            self._all_are_texts = False

    def encode(self, encoder: CheckedEncoder, dtype: np.dtype[Any]) -> tuple[Tokens, np.ndarray]:
        """Tokens of all documents [n] and their lengths [documents].

        Raises:
            DataError: if the engine gives an id that ``dtype`` cannot hold.
        """
        if self._all_are_texts:
            return self._encode_texts(encoder, dtype)
        return self._encode_segments(encoder, dtype)

    def _encode_texts(
        self, encoder: CheckedEncoder, dtype: np.dtype[Any]
    ) -> tuple[Tokens, np.ndarray]:
        """As :meth:`_encode_segments`, for documents of one text each."""
        texts: list[Any] = self._documents
        ids, offsets = encoder.encode_flat(texts, self._digests, self._names)
        check_ids(ids, dtype)
        before, after = len(self._before), len(self._after)
        lengths = np.diff(offsets) + (before + after)
        ends = np.cumsum(lengths)
        tokens = np.empty(int(ends[-1]), dtype=dtype)
        # Where the texts begin and end; literals fill what is between.
        begins = ends - lengths + before
        stops = ends - after
        if ids.size <= FEW_TOKENS * len(texts):
            is_text = np.ones(tokens.size, dtype=bool)
            for number, literal in enumerate(self._before):
                is_text[begins - (before - number)] = False
                tokens[begins - (before - number)] = literal
            for number, literal in enumerate(self._after):
                is_text[stops + number] = False
                tokens[stops + number] = literal
            tokens[is_text] = ids
            return tokens, lengths
        places = zip(begins.tolist(), stops.tolist(), offsets[:-1].tolist(), strict=True)
        for begin, stop, start in places:
            tokens[begin - before : begin] = self._before
            tokens[begin:stop] = ids[start : start + stop - begin]
            tokens[stop : stop + after] = self._after
        return tokens, lengths

    def _encode_segments(
        self, encoder: CheckedEncoder, dtype: np.dtype[Any]
    ) -> tuple[Tokens, np.ndarray]:
        segments: list[str | int] = []
        first_segments: list[int] = []
        for document in self._documents:
            first_segments.append(len(segments))
            segments += self._before
            segments += [document] if isinstance(document, str) else document
            segments += self._after
        # -1 marks a text: token ids are never negative.
        literals = np.array(
            [segment if isinstance(segment, int) else -1 for segment in segments], dtype=np.int64
        )
        is_text = literals < 0
        texts = [segment for segment in segments if isinstance(segment, str)]
        digests = self._digests
        names = self._names
        # reduceat sums from each document's first segment to the next document's.
        counts = np.add.reduceat(is_text, first_segments, dtype=np.int64)
        if (counts != 1).any():
            owners = np.repeat(np.arange(len(counts)), counts).tolist()
            digests = [digests[owner] for owner in owners]
            names = [names[owner] for owner in owners]
        ids, offsets = encoder.encode_flat(texts, digests, names)
        check_ids(ids, dtype)
        sizes = np.ones(len(literals), dtype=np.int64)
        sizes[is_text] = np.diff(offsets)
        starts = np.cumsum(sizes) - sizes
        tokens = np.empty(int(sizes.sum()), dtype=dtype)
        tokens[starts[~is_text]] = literals[~is_text]
        for target, start, end in zip(
            starts[is_text].tolist(), offsets[:-1].tolist(), offsets[1:].tolist(), strict=True
        ):
            tokens[target : target + end - start] = ids[start:end]
        return tokens, np.add.reduceat(sizes, first_segments)


def check_ids(ids: np.ndarray, dtype: np.dtype[Any]) -> None:
    """Check that token ids fit a type.

    Raises:
        DataError: if one does not.
    """
    if ids.size and ids.max() > np.iinfo(dtype).max:
        raise DataError(
            f"the tokenizer gives the id {ids.max()}, which does not fit {dtype.name}: its"
            " vocabulary is larger than it says"
        )
