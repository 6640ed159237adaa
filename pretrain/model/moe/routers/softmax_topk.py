"""Softmax, then the k largest probabilities (Shazeer et al. 2017; Mixtral, Qwen-MoE, OLMoE).

With renormalised weights it is gpt-oss' router too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from pretrain.core.section import Effect
from pretrain.model.moe.routers.interface import Router

if TYPE_CHECKING:
    from torch import Tensor


class SoftmaxTopK(Router):
    """Probabilities compete: what one expert wins, the others lose."""

    scores_add_up_to_one: ClassVar[bool] = True
    kind: Literal["softmax_topk"] = "softmax_topk"
    temperature: Annotated[float, Field(gt=0), Effect.FUNCTION] = Field(
        1.0, description="logits are divided by this; above 1 choices are more even"
    )

    def scores(self, logits_TE: Tensor) -> Tensor:
        # 1 needs no pass over the logits, nor one over their gradient.
        if self.temperature != 1.0:
            logits_TE = logits_TE / self.temperature
        return logits_TE.softmax(dim=-1)

    def probabilities(self, scores_TE: Tensor) -> Tensor:
        return scores_TE

    def weights_vary(self, num_experts: int, top_k: int) -> bool:
        """Not for a single expert either: its probability is always 1."""
        return num_experts > 1 and super().weights_vary(num_experts, top_k)
