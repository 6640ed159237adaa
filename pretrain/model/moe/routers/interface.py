"""The interface of a router: a section of the recipe that computes scores and weights."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from pretrain.core.section import Effect, Positive, Section

if TYPE_CHECKING:
    from torch import Tensor


class ExpertGroups(Section):
    """A token first chooses groups of neighbouring experts, then experts inside them.

    DeepSeek-V2, section 2.1.3. Experts are on ranks in order, so with as many groups as nodes a
    token's rows travel to at most ``top_k_groups`` nodes.
    """

    num_groups: Positive
    top_k_groups: Positive
    score: Literal["max", "top2_sum"] = Field(
        "max", description="what a group is chosen by: its best expert (V2), or its two best (V3)"
    )


class Router(Section):
    """A kind of router; it computes in fp32, whatever the model's precision.

    Attributes:
        learned_noise: whether it has a second matrix, whose product :meth:`noisy_logits` gets in
            training.
        scores_add_up_to_one: over all experts of a token.
    """

    learned_noise: ClassVar[bool] = False
    scores_add_up_to_one: ClassVar[bool] = False

    bias: bool = Field(False, description="a learned bias on the logits")
    norm_topk_prob: Annotated[bool, Effect.FUNCTION] = Field(
        True,
        description="the chosen experts' weights are divided by their sum; false by default if "
        "top_k is 1, whose weight would always be 1",
    )
    routed_scaling_factor: Annotated[float, Field(gt=0), Effect.FUNCTION] = Field(
        1.0, description="the weights are multiplied by this"
    )
    jitter: Annotated[float, Field(ge=0, lt=1), Effect.NONE] = Field(
        0.0, description="in training the input is multiplied by 1 +- this at random (Switch)"
    )
    groups: Annotated[ExpertGroups | None, Effect.FUNCTION] = None

    def keeps_the_meaning_of(self, other: Section) -> bool:
        """Always true: every kind scores an expert higher for a larger logit."""
        return True

    def weights_vary(self, num_experts: int, top_k: int) -> bool:
        """Whether the weights of a token's experts depend on its scores.

        If they do not, the language loss has no gradient for the router.
        """
        return not (self.norm_topk_prob and top_k == 1)

    @abstractmethod
    def scores(self, logits_TE: Tensor) -> Tensor:
        """[T, E] -> [T, E]: what experts are chosen by and weights are computed from.

        Not negative, larger for the better expert.
        """

    def probabilities(self, scores_TE: Tensor) -> Tensor:
        """A distribution over the experts for losses and statistics, [T, E]."""
        return scores_TE / scores_TE.sum(dim=-1, keepdim=True).clamp_min(1e-20)

    def noisy_logits(self, logits_TE: Tensor, noise_TE: Tensor) -> Tensor:
        """The logits of a training step, from the clean ones and the noise matrix' product.

        Only called for a kind with ``learned_noise``, which must define it.
        """
        raise NotImplementedError(f"{type(self).__name__} has learned_noise, but no noisy_logits")

    def weights(self, scores_TK: Tensor) -> Tensor:
        """The weights of the chosen experts' outputs, from their scores."""
        # Sigmoid scores may all be tiny: the bound keeps their sum from dividing by zero.
        if self.norm_topk_prob:
            scores_TK = scores_TK / scores_TK.sum(dim=-1, keepdim=True).clamp_min(1e-20)
        if self.routed_scaling_factor != 1.0:
            scores_TK = scores_TK * self.routed_scaling_factor
        return scores_TK

    def check(self, num_experts: int, top_k: int) -> None:
        """Check that this router can choose ``top_k`` of ``num_experts``.

        Raises:
            ValueError: if it cannot.
        """
        if self.groups is None:
            return
        count = self.groups.num_groups
        kept = self.groups.top_k_groups
        if num_experts % count:
            raise ValueError(
                f"router.groups.num_groups ({count}) does not divide num_experts ({num_experts})"
            )
        if kept > count:
            raise ValueError(
                f"router.groups.top_k_groups is {kept}, but there are only {count} groups"
            )
        # Experts outside of the chosen groups are masked: too few remain otherwise.
        if kept * (num_experts // count) < top_k:
            raise ValueError(
                f"top_k is {top_k}, but {kept} of {count} groups hold only "
                f"{kept * (num_experts // count)} experts"
            )
        if self.groups.score == "top2_sum" and num_experts // count < 2:
            raise ValueError("router.groups.score=top2_sum needs two experts in a group")
