"""In which number format each part of a model computes, and why, before anything is started.

It asks the modules of the model itself, built without memory, so that it cannot differ from what
:func:`pretrain.engine.float8.convert_linears` and the cast of DeepSpeed do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from pretrain.engine.float8 import MULTIPLE, takes_fp8
from pretrain.model.config import ModelConfig
from pretrain.model.decoder import DecoderLM
from pretrain.model.fp32 import KeepsFp32
from pretrain.model.moe.product_keys import ProductKeys
from pretrain.model.moe.tables.products import ExpertTable
from pretrain.model.norm import LayerNorm, RMSNorm


@dataclass(frozen=True)
class PartPrecision:
    """A part of a model that computes in one format.

    Attributes:
        precision: ``fp8``, ``bf16``, ``fp16`` or ``fp32``.
        parameters: of all modules of the part, with the vocabulary's padding; experts on all ranks
            together; tied weights in both parts that use them.
        reason: why this format, and not the one of the recipe's name.
    """

    part: str
    precision: str
    parameters: int
    reason: str


# What a module's name contains, by the part that it belongs to; the first that fits counts.
PARTS = (
    (".retrieval.query", "retrieval queries"),
    (".retrieval", "product keys"),
    (".router", "router"),
    (".gate.wg", "router"),
    (".shared.gate", "gate of shared experts"),
    (".shared", "shared experts"),
    ("experts", "experts"),
    (".attention", "attention projections"),
    ("head", "head"),
    ("embedding", "embedding"),
    ("projection", "projection of multi-token prediction"),
    ("feed_forward", "dense feed-forwards"),
)
NORMS = "norms"
OTHERS = "other parameters"
# Why a part is not in the format of a lower-precision run.
ROUTER_REASON = "small differences of its scores decide which experts are chosen"
REASONS = {
    "product keys": ROUTER_REASON,
    "router": ROUTER_REASON,
    "retrieval queries": "its output chooses experts, which 3 bits of mantissa would flip",
    "head": "its rounding would be in every logit; logits and loss are fp32",
    "embedding": "rows are looked up, nothing is multiplied",
    NORMS: "elementwise; sums are accumulated in fp32",
}


def part_precisions(config: ModelConfig, precision: str) -> list[PartPrecision]:
    """Return the parts of a model in the order of its layers.

    Args:
        config: with the size of its vocabulary.
        precision: of the run: ``fp32``, ``bf16``, ``fp16`` or ``fp8``.
    """
    # On the meta device a model of any size takes no memory.
    with torch.device("meta"):
        model = DecoderLM(config)
    counted: dict[tuple[str, str, str], int] = {}
    fp32_below: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, KeepsFp32):
            fp32_below.append(name)
        own = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        if own:
            below = any(name == root or name.startswith(f"{root}.") for root in fp32_below)
            key = _format(name, module, precision, keeps_fp32=below)
            counted[key] = counted.get(key, 0) + own
    return [
        PartPrecision(part, form, count, reason) for (part, form, reason), count in counted.items()
    ]


def _format(
    name: str, module: nn.Module, precision: str, *, keeps_fp32: bool
) -> tuple[str, str, str]:
    """Return a module's part, its format, and the reason for it."""
    part = _part(name, module)
    if precision == "fp32":
        return part, "fp32", "everything is"
    if isinstance(module, ExpertTable):
        return part, "fp32", "single rows of a table are read, which no matrix product would speed"
    if keeps_fp32 or isinstance(module, ProductKeys):
        return part, "fp32", REASONS.get(part, ROUTER_REASON)
    if precision != "fp8":
        return part, precision, "weights, activations and products"
    if takes_fp8(module, name):
        return part, "fp8", f"products of matrices whose sides are multiples of {MULTIPLE}"
    if part in REASONS:
        return part, "bf16", REASONS[part]
    if isinstance(module, nn.Linear):
        return part, "bf16", f"a side is no multiple of {MULTIPLE}, which fp8 products need"
    if part == "experts":
        return part, "bf16", "all experts are multiplied at once, which Float8Linear does not do"
    return part, "bf16", "no matrix product"


def _part(name: str, module: nn.Module) -> str:
    # The norm of queries is inside of the retrieval, and those of latents inside of attention.
    if isinstance(module, RMSNorm | LayerNorm):
        return NORMS
    return next((part for fragment, part in PARTS if fragment in name), OTHERS)
