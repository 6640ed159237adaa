"""Sigmoid scores, then the k largest (DeepSeek-V3, section 2.1.2, eq. 12 to 15; Llama 4,
GLM-4.5).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pretrain.model.moe.routers.interface import Router

if TYPE_CHECKING:
    from torch import Tensor


class SigmoidTopK(Router):
    """Each expert is scored by itself, so that a bias moves its choice and no other score: what
    balancing by bias was made for.
    """

    kind: Literal["sigmoid_topk"]

    def scores(self, logits_TE: Tensor) -> Tensor:
        return logits_TE.sigmoid()
