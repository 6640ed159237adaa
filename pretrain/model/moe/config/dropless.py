"""The section of the dropless layer, on DeepSpeed's AutoEP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field

from pretrain.core.registry import NameOf
from pretrain.core.section import Effect
from pretrain.model.moe.config.base import ExpertTensors, Role, RoutedMoE
from pretrain.model.moe.exchange.config import (
    DroplessPart,
    Exchange,
    ExpertKernel,
    exchange_section,
    expert_kernel_section,
)

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
    expert_kernel: Annotated[str, NameOf(ExpertKernel), Effect.NONE] = Field(
        "auto",
        description="'auto': grouped_mm for bf16, and on CPUs in training for fp32 too; else a loop",
    )
    exchange: Annotated[str, NameOf(Exchange), Effect.NONE] = Field(
        "all_to_all", description="what moves tokens between ranks, with parallel.ep_size above 1"
    )
    deduplicate: Annotated[bool | None, Effect.NONE] = Field(
        None,
        description="a token travels once to each rank that has some of its experts, which sums "
        "their outputs; by default if top_k is above parallel.ep_size, which saves rows for "
        "certain, and there is no model.dropout.expert",
    )

    def deduplicates(self, ep_size: int, expert_dropout: float) -> bool:
        """Whether rows of one token to one rank are joined, among ``ep_size`` ranks.

        Args:
            expert_dropout: ``model.dropout.expert``, which is drawn where a token belongs to, and
                needs the output of each expert there.
        """
        if self.deduplicate is None:
            return self.top_k > ep_size > 1 and not expert_dropout
        return self.deduplicate

    def portable(self) -> Self:
        parts = [expert_kernel_section(self.expert_kernel), exchange_section(self.exchange)]
        names = {part.field.rpartition(".")[2]: part.default for part in parts if part.package}
        return self.model_copy(update=names)

    def device_parts(self, ep_size: int) -> list[type[DroplessPart]]:
        kernel = expert_kernel_section(self.expert_kernel)
        return [kernel, exchange_section(self.exchange)] if ep_size > 1 else [kernel]

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
