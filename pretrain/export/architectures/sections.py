"""Sections of a recipe's model as the one kind that an architecture supports.

The architecture's white list has refused all other kinds before: the assertions are for mypy.
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
    """The attention, for architectures that support ``attention.kind=gqa`` only."""
    assert isinstance(model.attention, GroupedQueryAttentionConfig)
    return model.attention


def latent(model: ModelConfig) -> MultiHeadLatentAttentionConfig:
    """The attention, for architectures that support ``attention.kind=mla`` only."""
    assert isinstance(model.attention, MultiHeadLatentAttentionConfig)
    return model.attention


def rotary(model: ModelConfig) -> RotaryBase:
    """The positions, for architectures that support rotary ones only."""
    assert isinstance(model.position, RotaryBase)
    return model.position


def clamped(model: ModelConfig) -> Clamped:
    """The feed-forward, for architectures that support clamped ones only."""
    assert isinstance(model.feed_forward, Clamped)
    return model.feed_forward


def routed(model: ModelConfig) -> RoutedMoE:
    """The experts, for architectures whose layers have routers."""
    assert model.routing is not None
    return model.routing
