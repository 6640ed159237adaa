"""Optimizer state at ZeRO stage 0 in low precision.

Fact: at stage 0 in bf16 and fp16 ``deepspeed.initialize`` takes one optimizer step on zero
    gradients, to allocate the state.
Versions: 0.19.8
Upstream: none known
Effect: Adam would start at its second step, with a bias correction too weak for its moments.
    Weights do not move by it, because the learning rate of every group is still 0.
Test:
    tests/integration/engine/test_deepspeed_facts.py::test_stage_0_in_low_precision_takes_a_step_when_it_starts
"""

from __future__ import annotations

from typing import Any


def forget_first_step(optimizer: Any, zero_stage: int, precision: str) -> None:
    """Clear the state that DeepSpeed's own step left in the optimizer that it returned."""
    if zero_stage == 0 and precision != "fp32":
        optimizer.state.clear()
