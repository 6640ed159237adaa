"""Which documents are held out: a hash of a document's id decides, so that adding documents never moves one."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from data_pipeline.sources import Document
from pretrain.config.errors import DataError

logger = logging.getLogger(__name__)

SplitName = Literal["train", "validation"]
SPLITS: tuple[SplitName, SplitName] = ("train", "validation")


def position(document_id: str) -> float:
    """A document's place in [0, 1], uniform over ids; the places below the validation share are held out."""
    return int.from_bytes(hashlib.blake2b(document_id.encode("utf-8"), digest_size=8).digest()) / 2**64


@dataclass(frozen=True)
class SplitPlan:
    """The split of one corpus.

    Attributes:
        validation_share: share of documents held out, in (0, 1).
        moved: the one document that goes to the other side than its hash says, because that side would be empty.
        cut: the corpus is a single document, which is cut in two.
    """

    validation_share: float
    moved: str | None = None
    cut: bool = False

    def assign(self, document: Document) -> list[tuple[SplitName, Document]]:
        """The split of a document, or its two parts where it is the only one."""
        if self.cut:
            parts = cut_at_line_end(document.text, 1.0 - self.validation_share)
            return [(split, replace(document, text=part, id=f"{document.id}#{split}")) for split, part in zip(SPLITS, parts, strict=True)]
        held_out = (position(document.id) < self.validation_share) != (document.id == self.moved)
        return [("validation" if held_out else "train", document)]


def plan_split(document_ids: Sequence[str], validation_share: float) -> SplitPlan:
    """The plan for a corpus of these documents. Neither split is ever empty.

    Raises:
        DataError: where there is no document at all.
    """
    if not document_ids:
        raise DataError("the source holds no document that is not empty: give files with text in them")
    if len(document_ids) == 1:
        logger.warning("there is a single document: its last part, about %.3g of it, is held out for validation", validation_share)
        return SplitPlan(validation_share, cut=True)
    by_position = sorted(document_ids, key=lambda document_id: (position(document_id), document_id))
    if position(by_position[0]) >= validation_share:
        logger.warning("no document's hash falls into the validation share of %.3g: %s is held out", validation_share, by_position[0])
        return SplitPlan(validation_share, moved=by_position[0])
    if position(by_position[-1]) < validation_share:
        logger.warning("every document's hash falls into the validation share of %.3g: %s is trained on", validation_share, by_position[-1])
        return SplitPlan(validation_share, moved=by_position[-1])
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
