"""The section that every kind of MoE layer extends, and the one of all kinds with a router."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from pretrain.core.registry import Component, OneOf
from pretrain.core.section import Effect, Experts, Section, Share, Width
from pretrain.model.moe.exchange.config import DroplessPart
from pretrain.model.moe.routers import Router, SoftmaxTopK

Weight = Annotated[float, Field(ge=0)]

# Parameter of one expert, named as in a dense feed-forward -> the tensors of a layer that hold it:
# see :meth:`RoutedMoE.expert_tensors`.
ExpertTensors = dict[str, tuple[str, ...]]
EXPERT_NUMBER = "{expert}"


class Role(Enum):
    """What a tensor of an MoE layer is for: code that sorts parameters asks for it, not a name."""

    ROUTER = "chooses experts, with a learning rate of its own; its matrices are no hidden ones"
    EXPERT = "a matrix or a vector of routed experts, or a stack of them"
    EXPERT_BIAS = "biases of all routed experts in rows: vectors, dense parameters of every rank"
    SHARED_EXPERT = "of the experts that see every token"
    SHARED_GATE = "the few rows that weigh the shared experts' output: no hidden matrix"
    RESIDUAL_EXPERT = "of the dense expert in parallel to the routed ones (PR-MoE)"
    RESIDUAL_GATE = "the few rows that weigh the residual expert: no hidden matrix"

    @property
    def is_gate(self) -> bool:
        """Whether each row of its matrices is an independent gate, which Muon must not mix."""
        return self in (Role.ROUTER, Role.SHARED_GATE, Role.RESIDUAL_GATE)


class BiasBalancing(Section):
    """Balancing without a loss (Wang et al. 2024; DeepSeek-V3, section 2.1.2).

    A bias on the scores that choose experts, never on their weights. After each optimizer step the
    bias of an expert with less than the mean load of the whole global batch rises by the rate, and
    that of one with more falls by it; then the mean is subtracted.
    """

    update_rate: Annotated[float, Field(gt=0), Effect.NONE] = 0.001
    schedule: Annotated[Literal["constant", "linear", "cosine"], Effect.NONE] = Field(
        "constant", description="how the rate falls to zero towards the frozen end"
    )
    frozen_share: Annotated[Share, Effect.NONE] = Field(
        0.0, description="share of the run's steps, at its end, in which the bias stays as it is"
    )


class MoE(Component):
    """What every kind of layer with many experts has; an expert is a ``model.feed_forward``.

    Attributes:
        tensor_roles: the role of each tensor by the start of its name below the feed-forward.
        zero_stages: DeepSpeed's stages that train this kind.
        spreads_experts: whether ranks can share its experts, with ``parallel.ep_size`` above 1.
        has_tables: whether experts are rows of fp32 tables, trained apart from DeepSpeed's engine.
        forms_expert_outputs: whether the output of one expert exists as a tensor, for its dropout.
        scales_with_width: whether muP has learning rates for it.
        has_universal_checkpoints: whether DeepSpeed loads such a layer at another ep_size.
    """

    tensor_roles: ClassVar[Mapping[str, Role]]
    zero_stages: ClassVar[tuple[int, ...]] = (0, 1, 2, 3)
    spreads_experts: ClassVar[bool] = True
    has_tables: ClassVar[bool] = False
    forms_expert_outputs: ClassVar[bool] = True
    scales_with_width: ClassVar[bool] = False
    has_universal_checkpoints: ClassVar[bool] = False

    moe_intermediate_size: Width = Field(description="hidden units of one expert")
    num_shared_experts: Annotated[int, Field(ge=0, le=2**16)] = Field(
        0, description="experts that see every token, as one feed-forward of their joint width"
    )
    shared_intermediate_size: Width | None = Field(
        None, description="width of one shared expert; moe_intermediate_size by default"
    )
    shared_expert_gate: bool = Field(
        False, description="the shared experts' output is multiplied by sigmoid(w x) (Qwen2-MoE)"
    )

    # --- sizes

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
    def experts_field(self) -> str:
        """The number of experts with the field that gives it, for error sentences."""
        return f"model.moe.num_experts ({self.total_experts})"

    @abstractmethod
    def kept_activations(self, hidden_size: int, kept: int) -> int:
        """Elements per token that a layer keeps for the backward pass.

        Args:
            kept: elements per hidden unit of a feed-forward of this model.
        """

    def portable(self) -> Self:
        """The same layer, computed by what runs anywhere without a further package."""
        return self

    def kept_products(self, hidden_size: int, products: int) -> int:
        """Elements per token of what matrix products return: selective recomputation keeps them.

        Args:
            products: elements per hidden unit of a feed-forward of this model.
        """
        return self.kept_activations(hidden_size, products)

    def products_per_token(self, name: str) -> int:
        """How many vectors per token the matrix ``name`` is multiplied with."""
        return 1

    # --- tensors, by their names below the layer's feed-forward

    def role_of(self, name: str) -> Role | None:
        """The role of a tensor; None if no layer of this kind has it."""
        if name.startswith("shared."):
            return Role.SHARED_GATE if name.startswith("shared.gate.") else Role.SHARED_EXPERT
        return next(
            (role for start, role in self.tensor_roles.items() if name.startswith(start)), None
        )

    def renumbered(self, name: str, number: Callable[[int], int]) -> str:
        """``name`` (whole or in part) with its expert's index, if any, mapped by ``number``."""
        return name

    def common_name(self, name: str) -> str:
        """``name`` as a dropless layer calls it, for parts that all kinds have (the router)."""
        return name

    def starts_at_zero(self, name: str) -> bool:
        """Whether initialisation sets a tensor to zero, in addition to every ``bias``."""
        return self.role_of(name) is Role.EXPERT_BIAS

    def initial_std(self, name: str, columns: int) -> float | None:
        """The initial standard deviation of a matrix, if it is not the model's."""
        return None

    @property
    def table_kernel(self) -> str:
        """The kernel of products with tables, see :func:`kernel_named`."""
        return "auto"

    # --- what it can be combined with

    @property
    def routing(self) -> RoutedMoE | None:
        """This section if a router scores every expert; None if not all scores are formed."""
        return None

    @property
    @abstractmethod
    def router_learns(self) -> bool:
        """Whether the language loss has a gradient for the choice of experts.

        It has none if the weights of a token's experts are constant.
        """

    @property
    @abstractmethod
    def why_router_is_deaf(self) -> str:
        """The error sentence if :attr:`router_learns` is false: the reason, and what to set."""

    @property
    def call_dependence(self) -> str | None:
        """Why a token's output in evaluation depends on more than the tokens before it, or None."""
        return None

    @property
    def drops_tokens(self) -> bool:
        """Whether a full expert computes nothing for further tokens."""
        return False

    @property
    def has_residual_expert(self) -> bool:
        """Whether a dense expert of the routed ones' width runs in parallel (PR-MoE)."""
        return False

    @property
    def draws_experts(self) -> bool:
        """Whether experts are drawn at random to some degree, apart from the router's noise."""
        return False

    @property
    def random_at_inference(self) -> list[str]:
        """Reasons why a finished model computes something else each time, one clause each."""
        return []

    def expert_shards(self, ep_size: int, world_size: int, zero_stage: int) -> int:
        """Ranks that share one set of experts."""
        return ep_size

    def device_parts(self, ep_size: int) -> list[type[DroplessPart]]:
        """The parts that may need a package, a GPU or a number format, among so many ranks."""
        return []

    def check(self) -> None:
        """Check that options of this section can be combined.

        Raises:
            ConfigError: if they cannot.
        """
        return

    def warnings(self) -> list[str]:
        """Sentences for a section that is allowed but probably not meant."""
        if self.shared_expert_gate and not self.shared_width:
            return [
                "model.moe.shared_expert_gate=true does nothing without shared experts: "
                "set model.moe.num_shared_experts, or leave it out"
            ]
        return []


def norm_is_by_default(router: Router) -> bool:
    """Whether the recipe does not set norm_topk_prob."""
    return "norm_topk_prob" not in router.model_fields_set


class RoutedMoE(MoE):
    """Experts with a router that scores every one of them."""

    scales_with_width: ClassVar[bool] = True
    num_experts: Experts
    top_k: Annotated[Experts, Effect.FUNCTION]
    router: Annotated[Router, OneOf()] = SoftmaxTopK()
    aux_loss_weight: Annotated[Weight, Effect.NONE] = Field(
        0.01,
        description="of E/k * sum_e f_e p_e, summed over MoE layers (Switch, Fedus et al. 2021, "
        "eq. 4)",
    )
    z_loss_weight: Annotated[Weight, Effect.NONE] = Field(
        0.001,
        description="of mean(logsumexp(router logits)^2), summed over MoE layers "
        "(ST-MoE, Zoph et al. 2022, eq. 5)",
    )
    sequence_loss_weight: Annotated[Weight, Effect.NONE] = Field(
        0.0,
        description="of the aux loss of each sequence by itself, averaged (DeepSeek-V3, eq. 17 to "
        "20)",
    )
    cv_loss_weight: Annotated[Weight, Effect.NONE] = Field(
        0.0,
        description="of the squared coefficient of variation of the experts' summed weights "
        "(Shazeer et al. 2017, eq. 6)",
    )
    entropy_loss_weight: Annotated[Weight, Effect.NONE] = Field(
        0.0,
        description="of ln E - entropy of the mean probabilities: lower is more diverse "
        "(Shen et al. 2023)",
    )
    balance_scope: Annotated[Literal["micro_batch", "global_batch"], Effect.NONE] = Field(
        "micro_batch",
        description="over which tokens f_e of aux_loss is counted; 'global_batch' costs one more "
        "forward pass a micro batch",
    )
    bias_balancing: BiasBalancing | None = None

    @property
    def routing(self) -> RoutedMoE | None:
        return self

    @property
    def total_experts(self) -> int:
        return self.num_experts

    @property
    def experts_per_token(self) -> int:
        return self.top_k

    @property
    def rows_per_choice(self) -> float:
        """Rows computed per choice of a token; more than 1 if experts are padded."""
        return 1.0

    def kept_activations(self, hidden_size: int, kept: int) -> int:
        residual = self.moe_intermediate_size if self.has_residual_expert else 0
        # Each choice copies its token's row on the way to the experts and on the way back.
        per_row = kept * self.moe_intermediate_size + 4 * hidden_size
        return kept * (self.shared_width + residual) + int(
            self.experts_per_token * self.rows_per_choice * per_row
        )

    def kept_products(self, hidden_size: int, products: int) -> int:
        residual = self.moe_intermediate_size if self.has_residual_expert else 0
        dense = products * (self.shared_width + residual)
        dense += hidden_size * ((self.shared_width > 0) + self.has_residual_expert)
        per_row = products * self.moe_intermediate_size + hidden_size
        return dense + int(self.experts_per_token * self.rows_per_choice * per_row)

    # --- tensors

    @abstractmethod
    def expert_tensors(self, parameters: Sequence[str]) -> ExpertTensors:
        """The tensors of a layer that hold the routed experts.

        Args:
            parameters: of one feed-forward of this model, such as ``gate_proj.weight``.

        Returns:
            For each parameter the names of the tensors that hold it, below the feed-forward. A name
                with ``{expert}`` is of one expert, any other holds all of them along its first
                dimension. Two names are the halves of the parameter's first dimension.
        """

    def keeps_matrices_whole(self, parameters: Sequence[str]) -> bool:
        """Whether each matrix of an expert is in one tensor."""
        return all(len(names) == 1 for names in self.expert_tensors(parameters).values())

    @property
    def router_module(self) -> str:
        """The module with the router's ``gate``, ``noise`` and ``balance_bias``."""
        return "router"

    @property
    def router_matrix(self) -> str:
        """The module that computes the router's logits."""
        return f"{self.router_module}.gate"

    def router_tensors(self) -> list[str]:
        """The router's tensors whose first dimension is the experts, its matrix first."""
        # Code that changes the number of experts (upcycling, merging) resizes all of these.
        names = [f"{self.router_matrix}.weight"]
        names += [f"{self.router_matrix}.bias"] if self.router.bias else []
        names += [f"{self.router_module}.noise.weight"] if self.router.learned_noise else []
        return names + ([self.balance_bias] if self.bias_balancing is not None else [])

    @property
    def balance_bias(self) -> str:
        """The buffer of balancing without a loss."""
        return f"{self.router_module}.balance_bias"

    def starts_at_zero(self, name: str) -> bool:
        return super().starts_at_zero(name) or name == f"{self.router_module}.noise.weight"

    # --- what it can be combined with

    @property
    def router_learns(self) -> bool:
        return self.router.weights_vary(self.num_experts, self.top_k)

    @property
    def why_router_is_deaf(self) -> str:
        return (
            "model.moe.router.norm_topk_prob=true with top_k=1 lets the router learn nothing from "
            "the language loss: one weight divided by itself is always 1; set "
            "model.moe.router.norm_topk_prob=false, or top_k=2 or more"
        )

    def warnings(self) -> list[str]:
        found = super().warnings()
        if self.top_k == 1 and not self.router.norm_topk_prob and norm_is_by_default(self.router):
            found.append(
                "model.moe.router.norm_topk_prob is false because top_k is 1: one weight divided "
                "by itself would always be 1, and the router would learn nothing from the "
                "language loss; the expert's output is multiplied by its score"
            )
        asked = [
            name for name in ("aux_loss_weight", "sequence_loss_weight") if getattr(self, name)
        ]
        asked += ["bias_balancing"] if self.bias_balancing is not None else []
        # f_e is then 1 for every expert: the losses are constants without a gradient.
        if self.top_k == self.num_experts and asked:
            several = len(asked) > 1
            found.append(
                f"model.moe.top_k ({self.top_k}) is num_experts: every token chooses all experts, "
                f"and {' and '.join(asked)} {'have' if several else 'has'} nothing to balance; "
                f"leave {'them' if several else 'it'} out, or lower top_k"
            )
        return found

    @model_validator(mode="after")
    def _one_choice_keeps_its_score(self) -> RoutedMoE:
        """Set norm_topk_prob to false if top_k is 1 and the recipe leaves it open."""
        if self.top_k == 1 and norm_is_by_default(self.router):
            router = self.router.model_copy(update={"norm_topk_prob": False})
            # norm_is_by_default must still see that nobody has set it.
            router.model_fields_set.discard("norm_topk_prob")
            # The section is frozen: a validator that runs after the fields is the one place to
            # change it.
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
