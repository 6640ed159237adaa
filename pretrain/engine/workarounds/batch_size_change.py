"""Batch sizes that change between two steps.

Fact: ``DeepSpeedEngine.set_train_batch_size`` leaves two things behind. The engine finds the end of
    a step by the number of all micro batches so far modulo the new accumulation, and its ZeRO
    optimizers keep the old accumulation, by which stages 1 and 2 choose a buffer under offload.
Versions: 0.19.8
Upstream: none known
Effect: after a phase with another accumulation, updates would come after a wrong number of micro
    batches.
Test:
    tests/integration/engine/test_deepspeed_facts.py::test_a_new_batch_size_leaves_the_count_of_micro_batches
"""

from __future__ import annotations

from typing import Any


def set_batch_sizes(engine: Any, micro_batch_size: int, accumulation_steps: int) -> None:
    """Make every following optimizer step one of ``accumulation_steps`` micro batches.

    To be called between two steps.

    Args:
        engine: DeepSpeed's.
        micro_batch_size: sequences per micro batch and rank.
    """
    engine.set_train_micro_batch_size(micro_batch_size)
    engine.set_train_batch_size(micro_batch_size * accumulation_steps * engine.dp_world_size)
    # The engine takes this modulo the accumulation to find the end of a step: start counting anew.
    engine.micro_steps = 0
    if hasattr(engine.optimizer, "gradient_accumulation_steps"):
        engine.optimizer.gradient_accumulation_steps = accumulation_steps
