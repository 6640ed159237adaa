"""A router: softmax over sharpened logits, then the k largest."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from pretrain.core.section import Effect
from pretrain.model.moe.routers.interface import Router

if TYPE_CHECKING:
    from torch import Tensor


class SharpTopK(Router):
    """Logits are multiplied before the softmax: choices are less even."""

    kind: Literal["sharp_topk"]
    sharpness: Annotated[float, Field(gt=0), Effect.FUNCTION] = 1.0

    def scores(self, logits_TE: "Tensor") -> "Tensor":
        """[T, E], each row a distribution."""
        return (logits_TE * self.sharpness).softmax(dim=-1)

    def probabilities(self, scores_TE: "Tensor") -> "Tensor":
        """The scores are probabilities already."""
        return scores_TE
