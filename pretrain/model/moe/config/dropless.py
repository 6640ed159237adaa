"""The section of the dropless layer, on DeepSpeed's AutoEP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from pretrain.core.section import Effect
from pretrain.model.moe.config.base import ExpertTensors, Role, RoutedMoE

# DeepSpeed's numbering: w1 and w3 are before the activation, w2 is after it.
_STACKS = {"gate_proj": 1, "down_proj": 2, "up_proj": 3}


class DroplessMoEConfig(RoutedMoE):
    """No token is dropped: rows travel to their experts by all-to-all, on DeepSpeed's AutoEP."""

    implementation: ClassVar[str] = "pretrain.model.moe.dropless:DroplessMoE"
    tensor_roles: ClassVar[Mapping[str, Role]] = {
        "router.": Role.ROUTER,
        "experts.": Role.EXPERT,
        "b1": Role.EXPERT_BIAS,
        "b2": Role.EXPERT_BIAS,
        "b3": Role.EXPERT_BIAS,
    }
    has_universal_checkpoints: ClassVar[bool] = True
    kind: Literal["dropless"] = "dropless"
    expert_kernel: Annotated[Literal["auto", "loop", "grouped_mm"], Effect.NONE] = Field(
        "auto", description="'auto': grouped_mm for bf16, on CPUs only in training; else a loop"
    )

    def expert_tensors(self, parameters: Sequence[str]) -> ExpertTensors:
        """All experts are stacked; without a gate w1 and w3 are the halves of the first matrix."""
        gated = any(name.startswith("gate_proj") for name in parameters)
        found: ExpertTensors = {}
        for parameter in parameters:
            matrix, part = parameter.split(".")
            numbers = (_STACKS[matrix],) if gated or matrix == "down_proj" else (1, 3)
            stem = "experts.w" if part == "weight" else "b"
            found[parameter] = tuple(f"{stem}{number}" for number in numbers)
        return found
