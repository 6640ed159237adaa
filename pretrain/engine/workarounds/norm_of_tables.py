"""The gradient norm of parameters that DeepSpeed does not train.

Fact: DeepSpeed's ZeRO stages clip by, report, and look for overflow in the norm of the parameters
    that they train themselves; there is no way to add others.
Versions: 0.19.8
Upstream: none known
Effect: a model with PEER's expert tables would be clipped by the norm of its dense part alone.
Test: tests/integration/distributed/test_same_numbers_everywhere.py fails without it; none shows
    that DeepSpeed has changed
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from deepspeed.runtime.utils import combine_grad_norm_groups


def count_in_norm(optimizer: Any, zero_stage: int, tables_norm: Callable[[], torch.Tensor]) -> None:
    """Make the norm at stages 1 to 3 that of the whole model, its tables included.

    Args:
        optimizer: the one that ``deepspeed.initialize`` returned.
        tables_norm: the tables' norm of this step, without loss scale, [] fp32.
    """

    def scaled() -> torch.Tensor:
        # DeepSpeed divides the combined norm by the loss scale, so the tables' part is multiplied
        # first.
        return tables_norm() * optimizer.loss_scale

    if zero_stage in (1, 2):
        norm_of_dense = optimizer.scaled_global_norm
        optimizer.scaled_global_norm = lambda norm_type=2: combine_grad_norm_groups(
            [norm_of_dense(norm_type), scaled()]
        )
    elif zero_stage == 3:
        groups_of_dense = optimizer._get_norm_groups
        optimizer._get_norm_groups = lambda: [*groups_of_dense(), scaled()]
