"""What a checkpoint can be exported to: a class a target, found by its definition."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from pretrain.core.files import JsonObject
from pretrain.export.name_map import Links
from pretrain.model.config import ModelConfig


class ExportTarget:
    """A class that transformers opens.

    A target is a class below this one that gives itself a ``name``.

    Attributes:
        name: what ``--target`` calls it; transformers' ``model_type``.
        architecture: transformers' class.
        keeps_factors: it takes a factorised embedding as it is, and not multiplied out.
        files: paths of what is copied next to ``config.json``, such as the code of a class that
            transformers lacks.
        order: ``--target auto`` takes the first target that is exact. What most programs read has
            the lowest order.
    """

    name: ClassVar[str]
    architecture: ClassVar[str]
    keeps_factors: ClassVar[bool] = False
    files: ClassVar[tuple[str, ...]] = ()
    order: ClassVar[int] = 100

    @abstractmethod
    def reasons_against(self, model: ModelConfig) -> list[str]:
        """Return the reasons why the target cannot compute ``model``; empty if it can."""

    @abstractmethod
    def links(self, model: ModelConfig) -> Links:
        """Return a link for each tensor of the export; only called if the target can."""

    @abstractmethod
    def config(self, model: ModelConfig, eod_id: int) -> JsonObject:
        """Return the target's own fields of ``config.json``."""
