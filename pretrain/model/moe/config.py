"""The mixture-of-experts section of a recipe's model: which experts there are, how they are chosen and balanced, what becomes of a full one."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from pretrain.core.registry import Component, OneOf
from pretrain.core.section import Effect, NonNegative, Positive, Section, Share
from pretrain.model.moe.routers import Router, SoftmaxTopK

Weight = Annotated[float, Field(ge=0)]


class BiasBalancing(Section):
    """Balancing without a loss (Wang et al. 2024; DeepSeek-V3, section 2.1.2): a bias on the scores that choose, never on the weights.

    After each optimizer step the bias of an expert that had less than the mean load of the whole global batch rises by the rate, that of one
    that had more falls by it; then the mean is taken off.
    """

    update_rate: Annotated[float, Field(gt=0), Effect.NONE] = 0.001
    schedule: Annotated[Literal["constant", "linear", "cosine"], Effect.NONE] = Field(
        "constant", description="how the rate falls to zero towards the frozen end"
    )
    frozen_share: Annotated[Share, Effect.NONE] = Field(
        0.0, description="share of the run's steps, at its end, in which the bias stays as it is"
    )


class MoE(Component):
    """What every kind of layer with many experts has; the form of an expert is ``model.feed_forward``."""

    moe_intermediate_size: Positive = Field(description="hidden numbers of one expert")
    num_shared_experts: NonNegative = Field(
        0, description="experts that see every token, as one feed-forward of their joint width"
    )
    shared_intermediate_size: Positive | None = Field(
        None, description="width of one shared expert; moe_intermediate_size by default"
    )
    shared_expert_gate: bool = Field(
        False, description="the shared experts' output is multiplied by sigmoid(w x) (Qwen2-MoE)"
    )

    @property
    def shared_width(self) -> int:
        """Width of all shared experts together; 0 without any."""
        return self.num_shared_experts * (
            self.shared_intermediate_size or self.moe_intermediate_size
        )

    @property
    @abstractmethod
    def total_experts(self) -> int:
        """Routed experts of one layer."""

    @property
    @abstractmethod
    def experts_per_token(self) -> int:
        """How many of them one token is sent to, at most."""

    @property
    @abstractmethod
    def router_learns(self) -> bool:
        """Whether the language loss has a gradient for what chooses experts: it has none if their weights are constant."""

    @property
    def depends_on_the_call(self) -> bool:
        """Whether a token's output in evaluation depends on more than the tokens before it: on what is computed together."""
        return False


def norm_is_by_default(router: Router) -> bool:
    """Whether a recipe leaves it open if the chosen experts' weights are divided by their sum."""
    return "norm_topk_prob" not in router.model_fields_set


class RoutedMoE(MoE):
    """Experts with a router that scores every one of them."""

    num_experts: Positive
    top_k: Annotated[Positive, Effect.FUNCTION]
    router: Annotated[Router, OneOf()] = SoftmaxTopK()
    aux_loss_weight: Annotated[Weight, Effect.NONE] = Field(
        0.01,
        description="of E/k * sum_e f_e p_e, summed over MoE layers (Switch, Fedus et al. 2021, eq. 4)",
    )
    z_loss_weight: Annotated[Weight, Effect.NONE] = Field(
        0.001,
        description="of mean(logsumexp(router logits)^2), summed over MoE layers (ST-MoE, Zoph et al. 2022, eq. 5)",
    )
    sequence_loss_weight: Annotated[Weight, Effect.NONE] = Field(
        0.0,
        description="of the aux loss of each sequence by itself, averaged (DeepSeek-V3, eq. 17 to 20)",
    )
    cv_loss_weight: Annotated[Weight, Effect.NONE] = Field(
        0.0,
        description="of the squared coefficient of variation of the experts' summed weights (Shazeer et al. 2017, eq. 6)",
    )
    entropy_loss_weight: Annotated[Weight, Effect.NONE] = Field(
        0.0,
        description="of ln E - entropy of the mean probabilities: lower is more diverse (Shen et al. 2023)",
    )
    balance_scope: Annotated[Literal["micro_batch", "global_batch"], Effect.NONE] = Field(
        "micro_batch",
        description="over which tokens f_e of aux_loss is counted; 'global_batch' costs one more forward pass a micro batch",
    )
    bias_balancing: BiasBalancing | None = None

    @property
    def total_experts(self) -> int:
        return self.num_experts

    @property
    def experts_per_token(self) -> int:
        return self.top_k

    @property
    def router_learns(self) -> bool:
        return self.router.weights_vary(self.num_experts, self.top_k)

    @model_validator(mode="after")
    def _one_choice_keeps_its_score(self) -> RoutedMoE:
        """norm_topk_prob is false by default if there is one choice; :func:`norm_is_by_default` knows that nobody set it."""
        if self.top_k == 1 and norm_is_by_default(self.router):
            router = self.router.model_copy(update={"norm_topk_prob": False})
            router.model_fields_set.discard("norm_topk_prob")
            self.__dict__["router"] = router
        return self

    @model_validator(mode="after")
    def _choices_fit(self) -> RoutedMoE:
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k is {self.top_k}, but there are only {self.num_experts} experts"
            )
        self.router.check(self.num_experts, self.top_k)
        return self


class DroplessMoE(RoutedMoE):
    """No token is dropped: rows travel by all-to-all to their experts, on DeepSpeed's AutoEP layer. Any ZeRO stage."""

    implementation: ClassVar[str] = "pretrain.model.moe.dropless:DroplessMoE"
    kind: Literal["dropless"] = "dropless"
    expert_kernel: Annotated[Literal["auto", "loop", "grouped_mm"], Effect.NONE] = Field(
        "auto", description="'auto': grouped_mm for bf16 on CUDA, else a loop"
    )


class DeepSpeedMoE(RoutedMoE):
    """DeepSpeed's native layer: capacity, drops or padding, noisy gates, residual experts. ZeRO 0, 1 and 2."""

    implementation: ClassVar[str] = "pretrain.model.moe.deepspeed_native:DeepSpeedMoE"
    kind: Literal["deepspeed"]
    gate: Literal["deepspeed", "router"] = Field(
        "deepspeed",
        description="'deepspeed' is its own gate, for the plain softmax_topk; 'router' takes every router, and drops the last tokens first",
    )
    capacity_factor: Annotated[float, Field(gt=0), Effect.NONE] = Field(
        1.25, description="room per expert in training, times tokens * top_k / num_experts"
    )
    eval_capacity_factor: Annotated[float, Field(gt=0), Effect.FUNCTION] = Field(
        2.0,
        description="the same in evaluation and generation, of the tokens of one call: see drop_tokens",
    )
    min_capacity: Annotated[NonNegative, Effect.FUNCTION] = Field(4, description="tokens")
    drop_tokens: Annotated[bool, Effect.FUNCTION] = Field(
        True,
        description="an expert has room for a share of the tokens that one call computes together, over all its texts, and "
        "its output is 0 for those that find none: so a token's logits depend on how many tokens the call has and on what "
        "comes before them in it, other texts included, and differ with a cache; false pads every expert to the fullest "
        "one, and drops nothing",
    )
    use_rts: Annotated[bool, Effect.FUNCTION] = Field(
        False, description="random token selection when an expert is full (top_k 1 only)"
    )
    noisy_gate_policy: Annotated[Literal["Jitter", "RSample"] | None, Effect.NONE] = None
    top2_2nd_expert_sampling: Annotated[bool, Effect.FUNCTION] = Field(
        False, description="Gumbel noise on the second choice (top_k 2 only)"
    )
    use_residual: bool = Field(
        False,
        description="a dense expert beside the routed ones, mixed by a learned coefficient (PR-MoE)",
    )
    causal: Annotated[bool, Effect.NONE] = Field(
        True,
        description="false acknowledges that gate=deepspeed lets later tokens push out earlier ones",
    )

    @property
    def router_learns(self) -> bool:
        """DeepSpeed's own gate never normalises a single choice."""
        return self.num_experts > 1 if self.gate == "deepspeed" else super().router_learns

    @property
    def depends_on_the_call(self) -> bool:
        return self.drop_tokens or self.top2_2nd_expert_sampling


class PEER(MoE):
    """Parameter-efficient expert retrieval (He 2024, "Mixture of a Million Experts"): very many very small experts, found by product keys.

    Expert (i, j, ...) has the score of sub-key i of the first dimension with the first part of a query, plus that of j with the second, and
    so on. Each head takes its best ``top_k`` and weighs them by a softmax over these. The experts have no biases.
    """

    implementation: ClassVar[str] = "pretrain.model.moe.peer:PEER"
    kind: Literal["peer"]
    product_key_sizes: Annotated[tuple[Positive, ...], Field(min_length=1)] = Field(
        description="sub-keys of each dimension; their product is the number of experts"
    )
    num_heads: Positive = Field(
        8,
        description="queries a token asks, each with a choice of its own; keys and experts are shared",
    )
    top_k: Annotated[Positive, Effect.FUNCTION] = Field(
        16,
        description="experts a head takes; with 1 its softmax is always 1, and keys and queries learn nothing",
    )
    query_dim: Positive = Field(
        256, description="size of one head's query, cut into one part a dimension"
    )
    query_bias: bool = False
    query_norm: Literal["rms_norm", "layer_norm", "batch_norm", "none"] = Field(
        "rms_norm",
        description="over each query; 'batch_norm' takes running statistics in training too: those of the batch would show later tokens",
    )
    moe_intermediate_size: Positive = Field(1, description="hidden numbers of one expert")
    expert_kernel: Annotated[Literal["auto", "plain", "bags", "triton"], Effect.NONE] = Field(
        "auto", description="'auto': triton on CUDA, else torch's embedding bags"
    )

    @property
    def total_experts(self) -> int:
        return math.prod(self.product_key_sizes)

    @property
    def experts_per_token(self) -> int:
        return min(self.num_heads * self.top_k, self.total_experts)

    @property
    def router_learns(self) -> bool:
        return self.top_k > 1

    @model_validator(mode="after")
    def _keys_fit(self) -> PEER:
        if self.top_k > self.total_experts:
            raise ValueError(
                f"top_k is {self.top_k}, but there are only {self.total_experts} experts"
            )
        if self.query_dim % len(self.product_key_sizes):
            raise ValueError(
                f"query_dim ({self.query_dim}) is no multiple of the {len(self.product_key_sizes)} dimensions of product_key_sizes"
            )
        return self
