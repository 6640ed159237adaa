"""YaRN: a rotary embedding stretched to longer sequences (Peng et al. 2023, sections 3.2, 3.4)."""

from __future__ import annotations

import math
from typing import cast

import torch

from pretrain.model.config import ModelConfig
from pretrain.model.positions.config import Yarn
from pretrain.model.positions.interface import PositionEncoding, PositionTerms
from pretrain.model.positions.rope import inverse_frequencies, rope_tables


def yarn_frequencies(config: Yarn, rotary_dim: int, device: torch.device) -> torch.Tensor:
    """The angle of each pair per position, radians, fp32 [H/2].

    A pair that rotates more than ``beta_fast`` times over the original length keeps its frequency;
    one that rotates less than ``beta_slow`` times has it divided by ``factor``; between them the
    share that is divided rises linearly with the pair's index.
    """
    frequencies = inverse_frequencies(rotary_dim, config.rope_theta, device)

    def pair_that_rotates(times: float) -> float:
        length = config.original_max_position_embeddings
        return (
            rotary_dim
            * math.log(length / (2 * math.pi * times))
            / (2 * math.log(config.rope_theta))
        )

    first, last = pair_that_rotates(config.beta_fast), pair_that_rotates(config.beta_slow)
    if config.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary_dim - 1)
    # A step function if both ends meet.
    width = last - first or 0.001
    divided = (
        (torch.arange(rotary_dim // 2, dtype=torch.float32, device=device) - first) / width
    ).clamp(0, 1)
    return frequencies * (1 - divided) + frequencies / config.factor * divided


class YarnPosition(PositionEncoding):
    """Rotary tables of :func:`yarn_frequencies`.

    Queries and keys both grow by the attention factor, so scores grow by its square. With
    ``mscale_all_dim`` all scores grow, also by the part of queries and keys that is not rotated.
    """

    def __init__(self, model: ModelConfig) -> None:
        super().__init__(model)
        self.config = cast(Yarn, model.position)
        self.rotary_dim = model.attention.rotary_dim
        config = self.config
        of_all = self._growth(self.config.mscale_all_dim or 0.0)
        by_default = (
            self._growth(1.0) if config.mscale is None else self._growth(config.mscale) / of_all
        )
        self.attention_factor = (
            by_default if config.attention_factor is None else config.attention_factor
        )
        self.score_factor = of_all**2

    def _growth(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.config.factor) + 1

    def terms(self, positions: torch.Tensor) -> PositionTerms:
        frequencies = yarn_frequencies(self.config, self.rotary_dim, positions.device)
        return PositionTerms(
            rope=rope_tables(positions, frequencies, self.attention_factor),
            score_factor=self.score_factor,
        )
