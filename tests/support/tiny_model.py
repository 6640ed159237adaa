"""Models small enough that a forward pass takes milliseconds."""

from __future__ import annotations

import torch

from pretrain.config.load import load_recipe
from pretrain.model.config import ModelConfig, Recomputation
from pretrain.model.decoder import DecoderLM
from pretrain.model.init import initialize

VOCAB_SIZE = 100
RECOMPUTATIONS: tuple[Recomputation, ...] = ("none", "selective", "full")
# Weights large enough that every part of the model shows in the logits.
SIZES = (f"model.vocab_size={VOCAB_SIZE}", "model.initializer_range=0.3")
KINDS = {
    "dropless": "model.moe={kind: dropless, num_experts: 4, top_k: 2, moe_intermediate_size: 24}",
    "deepspeed": (
        "model.moe={kind: deepspeed, num_experts: 4, top_k: 2, moe_intermediate_size: 24,"
        " drop_tokens: false}"
    ),
}


def tiny_config(*overrides: str) -> ModelConfig:
    """The debug recipe's model with a hundred tokens: D 32, two layers, N 4, M 2, H 8, E 4, K 2."""
    return load_recipe("debug", [*SIZES, *overrides]).model


def tiny_model(
    *overrides: str, activation_checkpointing: Recomputation = "none", seed: int = 1
) -> DecoderLM:
    model = DecoderLM(tiny_config(*overrides), activation_checkpointing=activation_checkpointing)
    initialize(model, seed)
    return model


def random_tokens(B: int, S: int, seed: int = 0) -> torch.Tensor:
    """Token ids [B, S] int64."""
    return torch.randint(0, VOCAB_SIZE, (B, S), generator=torch.Generator().manual_seed(seed))


def random_tensor(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Standard normal, a leaf that takes gradients."""
    return (
        torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()
    )
