"""All comparisons by name. The first side of each is ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from peers import generation, train_step
from peers.layers import Shape, dense_side, head_side, layer_side
from peers.measure import Measured, fast_format

Side = Callable[[], Measured]


@dataclass(frozen=True)
class Comparison:
    """Sides by name, and the ratio that each should reach at least."""

    sides: dict[str, Side]
    goals: dict[str, float] = field(default_factory=dict)


ZERO, ADAMW, PLAIN = "transformers + ZeRO 1", "transformers + AdamW", "our model, plain loop"
FINE = ("model.moe.num_experts=64", "model.moe.top_k=4", "model.moe.moe_intermediate_size=128")


def steps(zero_goal: float, adamw_goal: float, *overrides: str) -> Comparison:
    """A training step against transformers' model and a plain loop."""
    ways = {
        "ours": train_step.our_step,
        ZERO: train_step.transformers_zero_step,
        ADAMW: train_step.transformers_adamw_step,
        PLAIN: train_step.plain_step,
    }
    sides = {name: train_step.step_side(way, *overrides) for name, way in ways.items()}
    return Comparison(sides, {ZERO: zero_goal, ADAMW: adamw_goal, PLAIN: 0.96})


def layer(shape: Shape, native: float, grouped: float, dense: float) -> Comparison:
    """An MoE layer against DeepSpeed's with room for all, transformers' and a dense one."""
    return Comparison(
        {
            "ours": layer_side(shape, "dropless"),
            "DeepSpeed native": layer_side(shape, "deepspeed"),
            "transformers": layer_side(shape, "transformers"),
            "dense": dense_side(shape),
        },
        {"DeepSpeed native": native, "transformers": grouped, "dense": dense},
    )


def head(vocabulary: int, tokens: int, goal: float) -> Comparison:
    """The chunked loss against whole logits."""
    sides = {
        "ours": head_side(vocabulary, tokens, whole=False),
        "whole logits": head_side(vocabulary, tokens, whole=True),
    }
    return Comparison(sides, {"whole logits": goal})


def texts(batch: int, goal: float) -> Comparison:
    """Generation against transformers."""
    sides = {
        "ours": generation.our_side(batch),
        "transformers": generation.transformers_side(batch),
    }
    return Comparison(sides, {"transformers": goal})


def all_steps() -> dict[str, Comparison]:
    """Steps in bf16, if this CPU computes in it, and in fp32."""
    eight = {"step, 8 experts, fp32": steps(1.1, 1.1, "train.precision=fp32")}
    if fast_format() == "fp32":
        fine = steps(1.4, 1.2, "train.precision=fp32", *FINE)
        return eight | {"step, 64 experts top-4, fp32": fine}
    return {
        "step, 8 experts, bf16": steps(1.25, 1.15, "train.precision=bf16"),
        "step, 64 experts top-4, bf16": steps(1.4, 1.2, "train.precision=bf16", *FINE),
        **eight,
    }


# Layers and head are in the fast format.
COMPARISONS: dict[str, Comparison] = {
    **all_steps(),
    "layer, 8 experts top-2": layer(Shape(4096, 512, 1024, 8, 2), 1.1, 1.1, 0.9),
    "layer, 64 experts top-2": layer(Shape(4096, 512, 1024, 64, 2), 1.35, 1.1, 0.78),
    "layer, 128 experts top-2": layer(Shape(4096, 512, 1024, 128, 2), 1.5, 1.1, 0.62),
    "head, 32,768 tokens": head(32768, 2048, 1.4),
    "head, 131,072 tokens": head(131072, 1024, 1.3),
    "text, batch 1": texts(1, 1.5),
    "text, batch 8": texts(8, 1.3),
    "start until the first step": Comparison(
        {
            "ours": train_step.start_side(train_step.our_step),
            ZERO: train_step.start_side(train_step.transformers_zero_step),
        }
    ),
}
