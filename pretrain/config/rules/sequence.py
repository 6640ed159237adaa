"""The rules for ranks that share sequences."""

from __future__ import annotations

from pretrain.config.recipe import Recipe
from pretrain.core.errors import ConfigError


def sequence_is_shared_evenly(recipe: Recipe) -> None:
    """Each of the sp_size ranks must have as many tokens and heads as the others."""
    size = recipe.parallel.token_parts
    length = recipe.train.sequence_length
    if length % size:
        raise ConfigError(
            f"parallel.sp_size ({size}) does not divide train.sequence_length ({length}): change "
            "one of them"
        )
    attention = recipe.model.attention
    heads = attention.num_attention_heads
    if heads % size:
        raise ConfigError(
            f"parallel.sp_size ({size}) does not divide model.attention.num_attention_heads "
            f"({heads}), of which each rank computes a part: choose a divisor"
        )
    key_heads = attention.trained_key_heads
    if key_heads % size and size % key_heads:
        raise ConfigError(
            f"parallel.sp_size ({size}) neither divides model.attention.num_key_value_heads "
            f"({key_heads}) nor is a multiple of it: each rank computes as many key heads as the "
            "others, or a copy of one"
        )
