"""The section of PEER, whose experts are rows of tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from pretrain.core.section import Effect, Experts, Width
from pretrain.model.moe.config.base import MoE, Role

_KEYS = "retrieval.keys_"


class PEERConfig(MoE):
    """Parameter-efficient expert retrieval (He 2024, "Mixture of a Million Experts").

    A very large number of tiny experts, found by product keys. Expert (i, j, ...) has the score of
    sub-key i of the first dimension with the first part of a query, plus that of sub-key j with the
    second part, and so on. Each head takes its best ``top_k`` and weighs them by a softmax over
    these. The experts have no biases.
    """

    implementation: ClassVar[str] = "pretrain.model.moe.peer:PEER"
    tensor_roles: ClassVar[Mapping[str, Role]] = {
        "retrieval.": Role.ROUTER,
        "experts.": Role.EXPERT,
    }
    has_tables: ClassVar[bool] = True
    forms_expert_outputs: ClassVar[bool] = False
    kind: Literal["peer"]
    product_key_sizes: Annotated[tuple[Width, ...], Field(min_length=1)] = Field(
        description="sub-keys of each dimension; their product is the number of experts"
    )
    num_heads: Width = Field(
        8,
        description="queries a token asks, each with a choice of its own; keys and experts are "
        "shared",
    )
    top_k: Annotated[Experts, Effect.FUNCTION] = Field(
        16,
        description="experts a head takes; with 1 its softmax is always 1, and keys and queries "
        "learn "
        "nothing",
    )
    query_dim: Width = Field(
        256, description="size of one head's query, cut into one part a dimension"
    )
    query_bias: bool = False
    query_norm: Literal["rms_norm", "layer_norm", "batch_norm", "none"] = Field(
        "rms_norm",
        description="over each query; 'batch_norm' takes running statistics in training too: "
        "those of "
        "the batch would show later tokens",
    )
    moe_intermediate_size: Width = Field(1, description="hidden units of one expert")
    expert_kernel: Annotated[Literal["auto", "plain", "bags", "triton"], Effect.NONE] = Field(
        "auto", description="'auto': triton on CUDA, else torch's embedding bags"
    )

    @property
    def total_experts(self) -> int:
        return math.prod(self.product_key_sizes)

    @property
    def experts_per_token(self) -> int:
        # Heads may choose the same expert, so this is an upper bound.
        return min(self.num_heads * self.top_k, self.total_experts)

    @property
    def experts_field(self) -> str:
        return f"model.moe.product_key_sizes, whose product is ({self.total_experts})"

    def kept_activations(self, hidden_size: int, kept: int) -> int:
        """A token, its queries and the scores of its sub-keys, then a few per expert.

        No row of a table is copied.
        """
        # Queries are kept before and after their norm.
        scores = self.num_heads * (2 * self.query_dim + sum(self.product_key_sizes))
        experts = self.experts_per_token * ((kept + 1) * self.moe_intermediate_size + 6)
        return kept * self.shared_width + 2 * hidden_size + scores + experts

    def kept_products(self, hidden_size: int, products: int) -> int:
        """Queries and scores; products with rows of tables are none of matrices."""
        scores = self.num_heads * (self.query_dim + sum(self.product_key_sizes))
        shared = products * self.shared_width + hidden_size * (self.shared_width > 0)
        return shared + scores

    def products_per_token(self, name: str) -> int:
        """Sub-keys are multiplied with the query of each head."""
        return self.num_heads if name.startswith(_KEYS) else 1

    def initial_std(self, name: str, columns: int) -> float | None:
        """Of keys: the scores of normed queries start at about 1 (Lample et al. 2019)."""
        return columns**-0.5 if name.startswith(_KEYS) else None

    @property
    def table_kernel(self) -> str:
        return self.expert_kernel

    @property
    def router_learns(self) -> bool:
        return self.top_k > 1

    @property
    def why_router_is_deaf(self) -> str:
        return (
            "model.moe.top_k=1 lets the keys and queries of model.moe.kind=peer learn nothing: "
            "the softmax over a head's one expert is always 1, so that the language loss has no "
            "gradient for them; set model.moe.top_k=2 or more"
        )

    def expert_shards(self, ep_size: int, world_size: int, zero_stage: int) -> int:
        """All ranks at ZeRO stage 3: tokens travel, and no rank gathers the tables of others."""
        return world_size if zero_stage == 3 else ep_size

    def warnings(self) -> list[str]:
        found = super().warnings()
        if self.query_norm == "batch_norm":
            found.append(
                "model.moe.query_norm=batch_norm norms queries by running statistics, in training "
                "too, which lag behind what the queries become: rms_norm and layer_norm need none"
            )
        return found

    @model_validator(mode="after")
    def _keys_fit(self) -> PEERConfig:
        if self.top_k > self.total_experts:
            raise ValueError(
                f"top_k is {self.top_k}, but there are only {self.total_experts} experts"
            )
        if self.query_dim % len(self.product_key_sizes):
            raise ValueError(
                f"query_dim ({self.query_dim}) is no multiple of the {len(self.product_key_sizes)} "
                "dimensions of product_key_sizes"
            )
        return self
