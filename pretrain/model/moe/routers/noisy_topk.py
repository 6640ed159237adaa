"""Noisy top-k (Shazeer et al. 2017, eq. 3 to 5): learned Gaussian noise, in training only."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pretrain.model.moe.routers.interface import Router

if TYPE_CHECKING:
    from torch import Tensor


class NoisyTopK(Router):
    """Softmax over noisy logits.

    The noise's size is the softplus of a second product. Its matrix starts at zero: noise of ln 2.
    """

    learned_noise: ClassVar[bool] = True
    scores_add_up_to_one: ClassVar[bool] = True
    kind: Literal["noisy_topk"]

    def noisy_logits(self, logits_TE: Tensor, noise_TE: Tensor) -> Tensor:
        # softplus(x) = log(e^x + 1) without importing torch.
        softplus_TE = noise_TE.logaddexp(noise_TE.new_zeros(()))
        return logits_TE + logits_TE.new_empty(logits_TE.shape).normal_() * softplus_TE

    def scores(self, logits_TE: Tensor) -> Tensor:
        return logits_TE.softmax(dim=-1)

    def probabilities(self, scores_TE: Tensor) -> Tensor:
        return scores_TE

    def weights_vary(self, num_experts: int, top_k: int) -> bool:
        """Not for a single expert either: its probability is always 1."""
        return num_experts > 1 and super().weights_vary(num_experts, top_k)
