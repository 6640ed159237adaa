"""Sigmoid scores, then the k largest (DeepSeek-V3, eq. 12 to 15; Llama 4, GLM-4.5)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pretrain.model.moe.routers.interface import Router

if TYPE_CHECKING:
    from torch import Tensor


class SigmoidTopK(Router):
    """Each expert is scored independently of the others.

    So a balancing bias moves the choice of its expert and no other score.
    """

    kind: Literal["sigmoid_topk"]

    def scores(self, logits_TE: Tensor) -> Tensor:
        return logits_TE.sigmoid()
