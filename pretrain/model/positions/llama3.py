"""Llama 3.1's rotary embedding for longer sequences.

Meta's llama-models, ``apply_scaling`` of the reference implementation.
"""

from __future__ import annotations

import math
from typing import cast

import torch

from pretrain.model.config import ModelConfig
from pretrain.model.positions.config import Llama3
from pretrain.model.positions.interface import PositionEncoding, PositionTerms
from pretrain.model.positions.rope import inverse_frequencies, rope_tables


def llama3_frequencies(config: Llama3, rotary_dim: int, device: torch.device) -> torch.Tensor:
    """The angle of each pair per position, radians, fp32 [H/2].

    A pair that rotates more than ``high_freq_factor`` times over the original length keeps its
    frequency; one that rotates less than ``low_freq_factor`` times has it divided by ``factor``;
    between them the share that is kept rises linearly with the number of rotations.
    """
    frequencies = inverse_frequencies(rotary_dim, config.rope_theta, device)
    rotations = config.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = config.low_freq_factor, config.high_freq_factor
    kept = ((rotations - low) / (high - low)).clamp(0, 1)
    return frequencies * kept + frequencies / config.factor * (1 - kept)


class Llama3Position(PositionEncoding):
    """Rotary tables of :func:`llama3_frequencies`; unlike YaRN's, scores do not grow."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__(model)
        self.config = cast(Llama3, model.position)
        self.rotary_dim = model.attention.rotary_dim

    def terms(self, positions: torch.Tensor) -> PositionTerms:
        frequencies = llama3_frequencies(self.config, self.rotary_dim, positions.device)
        return PositionTerms(rope=rope_tables(positions, frequencies))
