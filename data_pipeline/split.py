"""Which documents are held out: a hash of a document decides, so that adding documents never moves one."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import xxhash

from data_pipeline.sources.interface import Document
from pretrain.config.errors import DataError

logger = logging.getLogger(__name__)

SplitName = Literal["train", "validation"]
SPLITS: tuple[SplitName, SplitName] = ("train", "validation")


def text_digest(text: str) -> int:
    """128-bit XXH3 of a document's UTF-8 text: equal texts are told by it."""
    return xxhash.xxh3_128_intdigest(text.encode("utf-8"))


def position(document: Document, digest: int) -> float:
    """A document's place in [0, 1), uniform over documents; those below the validation share are held out.

    It depends on the document's key, or on the digest of its text where it has none. So equal texts without keys are on the same side.
    """
    if document.key is None:
        return (digest >> 64) / 2**64
    return int.from_bytes(hashlib.blake2b(document.key.encode("utf-8"), digest_size=8).digest()) / 2**64


class Extreme(NamedTuple):
    """The document of a unit with the lowest or highest position."""

    position: float
    unit: int
    ordinal: int


@dataclass(frozen=True)
class SplitPlan:
    """The split of one corpus, apart from its hash.

    Attributes:
        moved: (unit, number inside it) of the one document that goes to the other side than its hash says, because that side would be empty.
        cut: the corpus is a single document, which is cut in two.
    """

    validation_share: float
    moved: tuple[int, int] | None = None
    cut: bool = False

    def assign(self, text: str, place: float, unit: int, ordinal: int) -> list[tuple[SplitName, str]]:
        """The side of a document, or of its two parts where it is the only one."""
        if self.cut:
            return list(zip(SPLITS, cut_at_line_end(text, 1.0 - self.validation_share), strict=True))
        held_out = (place < self.validation_share) != ((unit, ordinal) == self.moved)
        return [("validation" if held_out else "train", text)]


def plan_split(validation_share: float, documents: int, lowest: Iterable[Extreme], highest: Iterable[Extreme]) -> SplitPlan:
    """The plan for a corpus in which neither split may be empty.

    Args:
        documents: how many documents the hash decides about.
        lowest, highest: of each unit that has documents.
    """
    if validation_share == 0.0 or documents == 0:
        return SplitPlan(validation_share)
    if documents == 1:
        logger.warning("there is a single document: its last part, about %.3g of it, is held out for validation", validation_share)
        return SplitPlan(validation_share, cut=True)
    first, last = min(lowest), max(highest)
    if first.position >= validation_share:
        logger.warning("no document's hash falls into the validation share of %.3g: the one with the lowest is held out", validation_share)
        return SplitPlan(validation_share, moved=(first.unit, first.ordinal))
    if last.position < validation_share:
        logger.warning("every document's hash falls into the validation share of %.3g: the one with the highest is trained on", validation_share)
        return SplitPlan(validation_share, moved=(last.unit, last.ordinal))
    return SplitPlan(validation_share)


def cut_at_line_end(text: str, share: float) -> tuple[str, str]:
    """Cuts a text in two after about ``share`` of its characters, at the nearest line end; neither part is empty.

    A line end that would halve either part is too far away (a title above one long line): then the cut is inside a line.

    Raises:
        DataError: for a text of one character.
    """
    if len(text) < 2:
        raise DataError("the only document is one character long, too short for a training and a validation part: give more text")
    target = min(max(round(len(text) * share), 1), len(text) - 1)
    ends = (text.rfind("\n", 0, target) + 1, text.find("\n", target) + 1)
    near = [end for end in ends if end >= target / 2 and len(text) - end >= (len(text) - target) / 2]
    cut = min(near, key=lambda end: abs(end - target), default=target)
    return text[:cut], text[cut:]
