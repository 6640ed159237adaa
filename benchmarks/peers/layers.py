"""One MoE layer, and the head with its loss, forward and backward."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from peers.measure import Measured, fast_format, seconds_of_flops, timed
from peers.models import recipe_of, transformers_model
from pretrain.engine.cpu_tuning import tune_for_training
from pretrain.engine.precision import DTYPES
from pretrain.engine.topology import free_port
from pretrain.engine.workarounds.shared_memory_all_reduce import avoid_shared_memory_all_reduce
from pretrain.model.block import Block
from pretrain.model.config import ModelConfig
from pretrain.model.decoder import DecoderLM
from pretrain.model.init import initialize
from pretrain.model.loss import LanguageModelHead

WARM_UP, CALLS = 4, 6


class Shape(NamedTuple):
    """Sizes of a layer: tokens T, hidden D, feed-forward F, experts E, choices K."""

    tokens: int
    hidden: int
    width: int
    experts: int
    top_k: int

    @property
    def flops(self) -> float:
        """Of the products of the chosen experts, forward and backward."""
        return 3 * 2 * 3.0 * self.tokens * self.top_k * self.hidden * self.width

    def overrides(self, kind: str) -> list[str]:
        """The settings of the quickstart's recipe for a model of one such layer."""
        drop = ", drop_tokens: false" if kind == "deepspeed" else ""
        return [
            "model.num_hidden_layers=1",
            f"model.hidden_size={self.hidden}",
            f"model.moe={{kind: {kind}, num_experts: {self.experts}, top_k: {self.top_k},"
            f" moe_intermediate_size: {self.width}{drop}}}",
        ]


def layer_side(shape: Shape, kind: str) -> Callable[[], Measured]:
    """A side that measures the MoE layer ``dropless``, ``deepspeed`` or ``transformers``."""

    def side() -> Measured:
        torch.manual_seed(0)
        return _forward_and_backward(build_layer(shape, kind), shape)

    return side


def build_layer(shape: Shape, kind: str) -> nn.Module:
    """The MoE layer ``dropless``, ``deepspeed`` or ``transformers``, on the CPU."""
    dtype = DTYPES[fast_format()]
    config = recipe_of(*shape.overrides("dropless" if kind == "transformers" else kind))
    if kind == "transformers":
        layer: nn.Module = transformers_model(config, dtype).model.layers[0].mlp
        return layer
    return _our_layer(config.model, dtype)


def _our_layer(config: ModelConfig, dtype: torch.dtype) -> nn.Module:
    tune_for_training()
    model = DecoderLM(config)
    initialize(model, 0)
    block = model.layers[0]
    assert isinstance(block, Block)
    layer = block.feed_forward.to(dtype)
    if config.moe is not None and config.moe.kind == "deepspeed":
        import deepspeed

        avoid_shared_memory_all_reduce()
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(free_port()))
        deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo")
        layer.set_deepspeed_parallelism()
    return layer


class Dense(nn.Module):
    """A SwiGLU of the active FLOPs of a shape, in plain PyTorch."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.width * shape.top_k
        self.up = nn.Linear(shape.hidden, width, bias=False)
        self.gate = nn.Linear(shape.hidden, width, bias=False)
        self.down = nn.Linear(width, shape.hidden, bias=False)
        self.to(DTYPES[fast_format()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., D]."""
        y: torch.Tensor = self.down(functional.silu(self.gate(x)) * self.up(x))
        return y


def dense_side(shape: Shape) -> Callable[[], Measured]:
    """A side that measures a dense SwiGLU of the same active FLOPs."""

    def side() -> Measured:
        torch.manual_seed(0)
        tune_for_training()
        return _forward_and_backward(Dense(shape), shape)

    return side


def _forward_and_backward(layer: nn.Module, shape: Shape) -> Measured:
    dtype = DTYPES[fast_format()]
    inputs = _hidden_states(shape, dtype)
    current: list[torch.Tensor] = []
    gradient = torch.randn(1, shape.tokens, shape.hidden, dtype=dtype)

    def prepare() -> None:
        current[:] = [next(inputs)]
        for parameter in layer.parameters():
            parameter.grad = None

    def call() -> None:
        output = layer(current[0])
        (output[0] if isinstance(output, tuple) else output).backward(gradient)

    floor = seconds_of_flops(shape.flops, dtype)
    return timed(call, warm_up=WARM_UP, repeats=CALLS, prepare=prepare, floor_seconds=floor)


def _hidden_states(shape: Shape, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    while True:
        x = torch.randn(1, shape.tokens, shape.hidden, generator=generator)
        yield x.to(dtype).requires_grad_()


def head_side(vocabulary: int, tokens: int, whole: bool) -> Callable[[], Measured]:
    """A side that measures the head with its loss: in chunks, or with all logits at once."""
    size = 256

    def side() -> Measured:
        torch.manual_seed(0)
        if not whole:
            tune_for_training()
        head = LanguageModelHead(
            size,
            padded_vocab_size=vocabulary,
            vocab_size=vocabulary,
            chunk_tokens=recipe_of().model.loss_chunk_tokens,
            z_loss_weight=0.0,
        )
        nn.init.normal_(head.weight, std=0.02)
        dtype = DTYPES[fast_format()]
        head.to(dtype)
        x = torch.randn(1, tokens, size).to(dtype).requires_grad_()
        labels = torch.randint(vocabulary, (1, tokens))

        def call() -> None:
            if whole:
                logits = functional.linear(x, head.weight).float()
                functional.cross_entropy(logits[0], labels[0], reduction="sum").backward()
            else:
                head(x, labels)[0].backward()
            x.grad = head.weight.grad = None

        flops = 3 * 2.0 * tokens * size * vocabulary
        floor = seconds_of_flops(flops, dtype)
        return timed(call, warm_up=2, repeats=5, floor_seconds=floor)

    return side
