"""Decides by a hash which documents are held out.

The hash is of the text as the shards hold it, of its file's path, or of its id.

Adding documents moves none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import xxhash

from data_pipeline.sources.config import SplitBy
from pretrain.core.errors import DataError

SplitName = Literal["train", "validation"]
SPLITS: tuple[SplitName, SplitName] = ("train", "validation")


def text_digest(text: str) -> int:
    """Return the 128-bit XXH3 of a document's UTF-8 text, which identifies equal texts."""
    return xxhash.xxh3_128_intdigest(text.encode("utf-8"))


def position(digest: int, name: str | None = None) -> float:
    """Return a document's place in [0, 1), uniform over texts or names.

    Places below the validation share are held out.

    Args:
        digest: of its text, which decides if there is no name.
        name: its path or id; all documents of the same name are on the same side.
    """
    if name is None:
        return (digest >> 64) / 2**64
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8"), digest_size=8).digest()) / 2**64


@dataclass(frozen=True)
class SplitPlan:
    """The split of one corpus, apart from its hash.

    Attributes:
        moved: the place whose documents go to the other side than it says, because that side would
            be empty.
        cut: the corpus is a single text, which is cut in two.
    """

    validation_share: float
    moved: float | None = None
    cut: bool = False

    def notice(self, by: SplitBy) -> str | None:
        """Return what was done so that neither side is empty, in a sentence; None for nothing."""
        share = f"the validation share of {self.validation_share:.3g}"
        if self.cut:
            return (
                f"there is a single text: its last part, about {self.validation_share:.3g} of it,"
                " is held out for validation"
            )
        if self.moved is None:
            return None
        the_one, is_ = (
            ("the one", "is") if by == "content" else (f"the documents of the {by}", "are")
        )
        if self.moved >= self.validation_share:
            return (
                f"no document's hash falls into {share}: {the_one} with the lowest {is_} held out"
            )
        return (
            f"every document's hash falls into {share}: {the_one} with the highest {is_} trained on"
        )

    def assign(self, text: str, place: float) -> list[tuple[SplitName, str]]:
        """The side of a document, or of its two parts if there is no other text."""
        if self.cut:
            return list(zip(SPLITS, self.parts(text), strict=True))
        return [(SPLITS[self.side(place)], text)]

    def side(self, place: float) -> int:
        """The index in ``SPLITS`` of a document that is not cut."""
        return int((place < self.validation_share) != (place == self.moved))

    def parts(self, text: str) -> tuple[str, str]:
        """The two parts of a text that is cut."""
        return cut_at_line_end(text, 1.0 - self.validation_share)


def plan_split(
    validation_share: float, by: SplitBy, documents: int, places: Iterable[float]
) -> SplitPlan:
    """The plan for a corpus in which neither split may be empty.

    Args:
        documents: how many documents the hash decides about.
        places: the lowest and the highest of them in each unit that has documents.

    Raises:
        DataError: if there are several texts, and all are of one path or id.
    """
    if validation_share == 0.0 or documents == 0:
        return SplitPlan(validation_share)
    found = set(places)
    lowest, highest = min(found), max(found)
    if lowest == highest and (documents == 1 or by == "content"):
        return SplitPlan(validation_share, cut=True)
    if lowest == highest:
        raise DataError(
            f"all {documents} documents have one {by}, so data.split_by={by} can hold none out:"
            " split by content, or give more files or ids"
        )
    if lowest >= validation_share:
        return SplitPlan(validation_share, moved=lowest)
    if highest < validation_share:
        return SplitPlan(validation_share, moved=highest)
    return SplitPlan(validation_share)


def cut_at_line_end(text: str, share: float) -> tuple[str, str]:
    """Cut a text in two after about ``share`` of its characters, at the nearest line end.

    Neither part is empty.

    A line end that would halve either part is too far away (a title above one long line): then the
    cut is inside a line.

    Raises:
        DataError: for a text of one character.
    """
    if len(text) < 2:
        raise DataError(
            "the only document is one character long, too short for a training and a validation"
            " part: give more text"
        )
    target = min(max(round(len(text) * share), 1), len(text) - 1)
    ends = (text.rfind("\n", 0, target) + 1, text.find("\n", target) + 1)
    near = [
        end for end in ends if end >= target / 2 and len(text) - end >= (len(text) - target) / 2
    ]
    cut = min(near, key=lambda end: abs(end - target), default=target)
    return text[:cut], text[cut:]
