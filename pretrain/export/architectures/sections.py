"""The sections of a recipe's model as an architecture that takes one kind of them alone knows them.

An architecture's white list names the kind; what it makes of such a section is asked for only if
nothing speaks against the model.
"""

from __future__ import annotations

from pretrain.model.attention.config import (
    GroupedQueryAttentionConfig,
    MultiHeadLatentAttentionConfig,
)
from pretrain.model.config import Clamped, ModelConfig
from pretrain.model.moe.config import RoutedMoE
from pretrain.model.positions.config import RotaryBase


def grouped_query(model: ModelConfig) -> GroupedQueryAttentionConfig:
    """The attention of an architecture that takes ``attention.kind=gqa`` only."""
    assert isinstance(model.attention, GroupedQueryAttentionConfig)
    return model.attention


def latent(model: ModelConfig) -> MultiHeadLatentAttentionConfig:
    """The attention of an architecture that takes ``attention.kind=mla`` only."""
    assert isinstance(model.attention, MultiHeadLatentAttentionConfig)
    return model.attention


def rotary(model: ModelConfig) -> RotaryBase:
    """The positions of an architecture that takes rotary ones only."""
    assert isinstance(model.position, RotaryBase)
    return model.position


def clamped(model: ModelConfig) -> Clamped:
    """The feed-forward of an architecture that takes clamped ones only."""
    assert isinstance(model.feed_forward, Clamped)
    return model.feed_forward


def routed(model: ModelConfig) -> RoutedMoE:
    """The experts of an architecture whose layers have routers."""
    assert model.routing is not None
    return model.routing
