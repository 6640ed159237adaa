"""The section of DeepSpeed's native MoE layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from pretrain.core.errors import ConfigError
from pretrain.core.section import Effect, NonNegative, Section
from pretrain.model.moe.config.base import EXPERT_NUMBER, ExpertTensors, Role, RoutedMoE
from pretrain.model.moe.routers import SoftmaxTopK

_EXPERTS = "deepspeed_moe.experts.deepspeed_experts."
_NUMBERED = re.compile(r"(deepspeed_experts\.)(\d+)(?=\.)")
# Names of modules that a dropless layer has too, in each of the two gates.
_COMMON_NAMES = {"deepspeed_moe.gate.wg.": "router.gate.", "deepspeed_moe.gate.router.": "router."}

DROPS = (
    "the model drops tokens (model.moe.drop_tokens=true): an expert has room for a share of the "
    "tokens of one call, so that logits depend on the batch and on the length of the call, and a "
    "cache, which computes token by token, drops fewer than a pass over the whole text"
)
DRAWS = (
    "the model draws second experts at random in evaluation too "
    "(model.moe.top2_2nd_expert_sampling=true): each call gives other logits"
)


class DeepSpeedMoEConfig(RoutedMoE):
    """DeepSpeed's native layer: capacity, drops or padding, noisy gates, residual experts."""

    implementation: ClassVar[str] = "pretrain.model.moe.deepspeed_native:DeepSpeedMoE"
    tensor_roles: ClassVar[Mapping[str, Role]] = {
        "deepspeed_moe.gate.": Role.ROUTER,
        "deepspeed_moe.experts.": Role.EXPERT,
        "mlp.": Role.RESIDUAL_EXPERT,
        "coefficient.": Role.RESIDUAL_GATE,
    }
    # DeepSpeed's native layer does not support partitioned parameters (stage 3).
    zero_stages: ClassVar[tuple[int, ...]] = (0, 1, 2)
    kind: Literal["deepspeed"]
    gate: Literal["deepspeed", "router"] = Field(
        "deepspeed",
        description="'deepspeed' is its own gate, for the plain softmax_topk; 'router' takes every "
        "router, and drops the last tokens first",
    )
    capacity_factor: Annotated[float, Field(gt=0), Effect.NONE] = Field(
        1.25, description="room per expert in training, times tokens * top_k / num_experts"
    )
    eval_capacity_factor: Annotated[float, Field(gt=0), Effect.FUNCTION] = Field(
        2.0,
        description="the same in evaluation and generation, of the tokens of one call: see "
        "drop_tokens",
    )
    min_capacity: Annotated[NonNegative, Effect.FUNCTION] = Field(4, description="tokens")
    drop_tokens: Annotated[bool, Effect.FUNCTION] = Field(
        True,
        description="an expert has room for a share of the tokens that one call computes "
        "together, over all its texts, and its output is 0 for those that find none: so a token's "
        "logits depend on how many tokens the call has and on what comes before them in it, other "
        "texts included, and differ with a cache; false pads every expert to the fullest one, and "
        "drops nothing",
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
        description="a dense expert in parallel to the routed ones, mixed by a learned coefficient "
        "(PR-MoE)",
    )
    causal: Annotated[bool, Effect.NONE] = Field(
        True,
        description="false acknowledges that gate=deepspeed lets later tokens push out earlier "
        "ones",
    )

    @property
    def router_learns(self) -> bool:
        """DeepSpeed's own gate never normalises a single choice."""
        return self.num_experts > 1 if self.gate == "deepspeed" else super().router_learns

    @property
    def rows_per_choice(self) -> float:
        return self.capacity_factor if self.drop_tokens else 1.0

    @property
    def drops_tokens(self) -> bool:
        return self.drop_tokens

    @property
    def has_residual_expert(self) -> bool:
        return self.use_residual

    @property
    def draws_experts(self) -> bool:
        return self.top2_2nd_expert_sampling or self.noisy_gate_policy == "RSample"

    @property
    def call_dependence(self) -> str | None:
        if self.drop_tokens:
            return DROPS
        return DRAWS if self.top2_2nd_expert_sampling else None

    @property
    def random_at_inference(self) -> list[str]:
        reasons = []
        if self.gate == "deepspeed" and self.use_rts and self.drop_tokens:
            reasons.append(
                "model.moe.use_rts is true: a full expert chooses its tokens at random at "
                "inference too"
            )
        if self.gate == "deepspeed" and self.top2_2nd_expert_sampling:
            reasons.append(
                "model.moe.top2_2nd_expert_sampling is true: second experts are drawn at random at "
                "inference too"
            )
        return reasons

    # --- tensors

    def expert_tensors(self, parameters: Sequence[str]) -> ExpertTensors:
        """Every expert is a feed-forward under its local index."""
        # An ExpertTensors key is the parameter; the placeholder stands for the expert's index.
        return {name: (f"{_EXPERTS}{EXPERT_NUMBER}.{name}",) for name in parameters}

    def renumbered(self, name: str, number: Callable[[int], int]) -> str:
        return _NUMBERED.sub(lambda match: f"{match[1]}{number(int(match[2]))}", name)

    @property
    def router_module(self) -> str:
        return "deepspeed_moe.gate.router"

    @property
    def router_matrix(self) -> str:
        return super().router_matrix if self.gate == "router" else "deepspeed_moe.gate.wg"

    def router_tensors(self) -> list[str]:
        """DeepSpeed's own gate has a matrix and nothing else."""
        return super().router_tensors()[: None if self.gate == "router" else 1]

    def common_name(self, name: str) -> str:
        for native, common in _COMMON_NAMES.items():
            name = name.replace(native, common)
        return name

    # --- rules

    def check(self) -> None:
        """Refuse drops that are not causal, and options that the gate cannot have.

        DeepSpeed's own gate ranks tokens across the whole micro batch. With top_k 1 and more than 2
        the kept tokens are chosen over all positions at once, with top_k 2 all second choices queue
        after all first choices: in each case a later token can push out an earlier one.

        Raises:
            ConfigError: if options of this section cannot be combined.
        """
        if self.gate == "deepspeed" and self.drop_tokens and self.causal:
            raise ConfigError(
                "model.moe with drop_tokens=true is not causal (a later token can take an earlier "
                "one's place in an expert): set model.moe.gate=router or "
                "model.moe.drop_tokens=false, or acknowledge it with model.moe.causal=false"
            )
        if self.gate == "router":
            self._check_gate_options_are_unset()
        else:
            self._check_gate_options_fit()
            self._check_router_is_plain()

    def _check_gate_options_are_unset(self) -> None:
        options = ("use_rts", "noisy_gate_policy", "top2_2nd_expert_sampling")
        if given := [name for name in options if getattr(self, name)]:
            raise ConfigError(
                f"model.moe.{given[0]} belongs to DeepSpeed's own gate: "
                "set model.moe.gate=deepspeed, or leave it out"
            )

    def _check_gate_options_fit(self) -> None:
        if self.use_rts and self.top_k != 1:
            raise ConfigError(
                f"model.moe.use_rts works with top_k=1 only, not {self.top_k}: "
                "set model.moe.use_rts=false"
            )
        if self.top2_2nd_expert_sampling and self.top_k != 2:
            raise ConfigError(
                f"model.moe.top2_2nd_expert_sampling works with top_k=2 only, not {self.top_k}: "
                "set it to false"
            )
        if self.noisy_gate_policy == "RSample" and self.top_k != 1:
            raise ConfigError(
                f"model.moe.noisy_gate_policy=RSample works with top_k=1 only, not {self.top_k}: "
                "use Jitter or none"
            )

    def _check_router_is_plain(self) -> None:
        # DeepSpeed normalises the weights of two and more choices, and never those of one.
        plain = SoftmaxTopK(norm_topk_prob=self.top_k > 1)
        if self.router == plain and self.bias_balancing is None:
            return
        given = [
            name
            for name in type(self.router).model_fields
            if getattr(self.router, name) != getattr(plain, name, None)
        ]
        what = (
            "model.moe.bias_balancing"
            if self.router == plain
            else f"model.moe.router.{_setting(self.router, given[0])}"
        )
        raise ConfigError(
            f"{what} does not go with DeepSpeed's own gate, which takes router kind softmax_topk "
            f"with norm_topk_prob={plain.norm_topk_prob} for top_k={self.top_k} and nothing else: "
            "set model.moe.gate=router, or model.moe.kind=dropless"
        )


def _setting(section: Section, name: str) -> str:
    """A field as a recipe would set it; for a nested section its name alone."""
    value = getattr(section, name)
    return name if isinstance(value, Section) else f"{name}={value}"
