"""The quickstart's model and its batches, here and in transformers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from pretrain.config.load import load_recipe
from pretrain.config.recipe import Recipe

VOCABULARY, LENGTH, MICRO_BATCH, MICRO_BATCHES = 8192, 256, 4, 2
LEARNING_RATE = 2.0e-3


def recipe_of(*overrides: str) -> Recipe:
    """The quickstart's recipe for one rank."""
    return load_recipe(
        "quickstart",
        [
            f"model.vocab_size={VOCABULARY}",
            "parallel.ep_size=1",
            f"train.micro_batch_size={MICRO_BATCH}",
            f"train.global_batch_size={MICRO_BATCH * MICRO_BATCHES}",
            f"train.sequence_length={LENGTH}",
            *overrides,
        ],
    )


def token_batches(recipe: Recipe, micro_batches: int) -> Iterator[list[torch.Tensor]]:
    """The micro batches of one step after the other, [B, S + 1] int64 each.

    Skewed as words are, and new in every step: experts get unequal and new numbers of rows.
    """
    generator = torch.Generator().manual_seed(1)
    train = recipe.train
    shape = train.micro_batch_size, train.sequence_length + 1
    largest = (recipe.model.vocab_size or 0) - 1
    while True:
        yield [
            (torch.randn(shape, generator=generator).abs() * 900).long().clamp(max=largest)
            for _ in range(micro_batches)
        ]


def transformers_model(recipe: Recipe, dtype: torch.dtype) -> Any:
    """The same model as transformers' own class with its default kernels, with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from pretrain.export.architectures.qwen3_moe import Qwen3Moe

    fields = Qwen3Moe().config(recipe.model, eod_id=0)
    config = AutoConfig.for_model(**fields)
    config.output_router_logits = True
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def transformers_loss(model: Any, ids_BS: torch.Tensor) -> torch.Tensor:
    """The loss of one micro batch with its load-balance loss."""
    loss: torch.Tensor = model(input_ids=ids_BS, labels=ids_BS, use_cache=False).loss
    return loss
