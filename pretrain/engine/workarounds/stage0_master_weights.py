"""The fp32 weights of parameters at ZeRO stage 0 in low precision.

Fact: at stage 0 in bf16 and fp16 DeepSpeed keeps the fp32 copies of parameters in lists of its
    optimizer, and ``safe_get_full_fp32_param`` knows nothing of them.
Versions: 0.19.8
Upstream: none known
Effect: checkpoints would hold weights rounded to 16 bits.
Test:
    tests/integration/engine/test_deepspeed_facts.py::test_stage_0_has_no_public_way_to_master_weights
"""

from __future__ import annotations

from typing import Any

import torch


def stage0_masters(optimizer: Any, precision: str) -> dict[int, torch.Tensor]:
    """The fp32 copy of each parameter by the parameter's id.

    Empty in fp32: parameters are their own masters.
    """
    if precision == "fp32":
        return {}
    pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
    return {id(low): high for lows, highs in pairs for low, high in zip(lows, highs, strict=True)}
