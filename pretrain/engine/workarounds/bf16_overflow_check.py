"""Gradients in bf16 that are not finite.

Fact: at stages 1 and 2 DeepSpeed applies a bf16 gradient that is not finite if
    ``bf16.check_grad_overflow`` is off, which a ds_config may ask for; it is on by default.
Versions: 0.19.8
Upstream: none known
Effect: one overflow would make all weights NaN, and the guard ``guards.non_finite`` would see
    nothing.
Test: tests/integration/guards/test_skipped_steps.py fails without it; none shows that DeepSpeed has
    changed
"""

from __future__ import annotations

OVERFLOW_CHECK = ("bf16", "check_grad_overflow")
