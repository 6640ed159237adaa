"""The model section of a recipe: a class per kind of component, and the model of them."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from pretrain.core.registry import Component, OneOf
from pretrain.core.section import (
    Effect,
    Layers,
    NonNegative,
    Positive,
    Section,
    SequenceTokens,
    Vocabulary,
    Width,
)
from pretrain.model.attention.config import Attention
from pretrain.model.init_config import Initialization, StandardInitialization
from pretrain.model.moe.config import MoE, Role, RoutedMoE
from pretrain.model.positions.config import Position, Rope

Weight = Annotated[float, Field(ge=0)]
Rate = Annotated[float, Field(ge=0, lt=1)]
# What of a block is recomputed in the backward pass (pretrain/model/recomputation.py).
Recomputation = Literal["none", "selective", "full"]

# --- norms ---


class Norm(Component):
    """What every kind of norm has."""

    eps: Annotated[float, Field(gt=0), Effect.FUNCTION] = 1e-6


class RMSNormConfig(Norm):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019)."""

    implementation: ClassVar[str] = "pretrain.model.norm:RMSNorm"
    kind: Literal["rms_norm"] = "rms_norm"


class LayerNormConfig(Norm):
    """(x - mean) / sqrt(variance + eps) * weight + bias (Ba et al. 2016)."""

    implementation: ClassVar[str] = "pretrain.model.norm:LayerNorm"
    kind: Literal["layer_norm"]


# --- feed-forwards: also the form of one expert ---


class FeedForwardConfig(Component):
    """What every kind has.

    Attributes:
        gated: two matrices before the activation, ``gate_proj`` and ``up_proj``; else ``up_proj``
            only.
        expansion: rows of each of these per hidden unit.
    """

    gated: ClassVar[bool] = True
    expansion: ClassVar[int] = 1

    bias: bool = Field(False, description="every matrix has a bias")

    @property
    def parameter_names(self) -> list[str]:
        """The parameters of one feed-forward, which is also the form of one expert."""
        matrices = [*(["gate_proj"] if self.gated else []), "up_proj", "down_proj"]
        parts = ("weight", "bias") if self.bias else ("weight",)
        return [f"{matrix}.{part}" for matrix in matrices for part in parts]

    @property
    def kept_per_unit(self) -> int:
        """Elements kept for the backward pass per hidden unit: products, activation, dropout."""
        return (2 if self.gated else 1) * self.expansion + 2


class SwiGLUConfig(FeedForwardConfig):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    implementation: ClassVar[str] = "pretrain.model.feed_forward:SwiGLU"
    kind: Literal["swiglu"] = "swiglu"


class GELUConfig(FeedForwardConfig):
    """down(gelu(up(x))), exact or in the tanh approximation (Hendrycks & Gimpel 2016)."""

    implementation: ClassVar[str] = "pretrain.model.feed_forward:GELU"
    gated: ClassVar[bool] = False
    kind: Literal["gelu"]
    approximate: Annotated[Literal["none", "tanh"], Effect.FUNCTION] = "none"


class SiLUConfig(FeedForwardConfig):
    """down(silu(up(x))): no gate (Elfwing et al. 2017)."""

    implementation: ClassVar[str] = "pretrain.model.feed_forward:SiLU"
    gated: ClassVar[bool] = False
    kind: Literal["silu"]


class Clamped(FeedForwardConfig):
    """What the clamped kinds have: the limit of a product, and the slope inside the sigmoid."""

    limit: Annotated[float, Field(gt=0), Effect.FUNCTION] = 7.0
    alpha: Annotated[float, Field(gt=0), Effect.FUNCTION] = 1.702


class ClampedSwiGLUConfig(Clamped):
    """down(g * sigmoid(alpha * g) * (u + 1)) with g at most ``limit`` and u within it (gpt-oss)."""

    implementation: ClassVar[str] = "pretrain.model.feed_forward:ClampedSwiGLU"
    kind: Literal["clamped_swiglu"]


class ProductSwiGLUConfig(Clamped):
    """:class:`ClampedSwiGLUConfig` of the interleaved halves of gate(x) * up(x) (Project 828).

    Both matrices are twice as wide. Before its clamp the product grows with the square of x: expect
    spikes of the gradient.
    """

    implementation: ClassVar[str] = "pretrain.model.feed_forward:ProductSwiGLU"
    expansion: ClassVar[int] = 2
    kind: Literal["product_swiglu"]


# --- which layers are mixtures of experts ---


class LayerPattern(Section):
    """Which layers are mixtures of experts."""

    @abstractmethod
    def is_moe(self, layer: int) -> bool:
        """Whether layer ``layer`` (from 0) is a mixture of experts."""

    def keeps_the_meaning_of(self, other: Section) -> bool:
        """Always true: tensors of dense layers and of mixtures of experts have different names."""
        return True


class AllMoE(LayerPattern):
    """Every layer is a mixture of experts."""

    kind: Literal["all_moe"] = "all_moe"

    def is_moe(self, layer: int) -> bool:
        return True


class AllDense(LayerPattern):
    """No layer is a mixture of experts."""

    kind: Literal["all_dense"]

    def is_moe(self, layer: int) -> bool:
        return False


class EveryNth(LayerPattern):
    """Layer i is a mixture of experts if (i + 1) % n == 0 (``decoder_sparse_step`` of HF)."""

    kind: Literal["every_nth"]
    n: Positive

    def is_moe(self, layer: int) -> bool:
        return (layer + 1) % self.n == 0


class FirstKDense(LayerPattern):
    """The first k layers are dense, the others mixtures (DeepSeek's ``first_k_dense_replace``)."""

    kind: Literal["first_k_dense"]
    k: NonNegative

    def is_moe(self, layer: int) -> bool:
        return layer >= self.k


# --- the model ---


class Dropout(Section):
    """Shares of elements that training zeroes, the others scaled up (Srivastava et al. 2014)."""

    embedding: Rate = Field(
        0.0, description="of what enters the first block, added positions included"
    )
    attention: Rate = Field(0.0, description="of the attention weights")
    residual: Rate = Field(
        0.0, description="of what attention and feed-forwards add to the residual stream"
    )
    feed_forward: Rate = Field(0.0, description="of the hidden units of feed-forwards and experts")
    expert: Rate = Field(0.0, description="of the output of each routed expert")


class MultiTokenPrediction(Section):
    """One more block that predicts the token after the next (DeepSeek-V3, section 2.2, depth 1).

    It shares the model's embedding and head.
    """

    loss_weight: Annotated[float, Field(gt=0)] = 0.3


class ModelConfig(Section):
    """A decoder-only transformer: embedding, blocks of attention and feed-forward, head."""

    vocab_size: Annotated[Vocabulary | None, Effect.FUNCTION] = Field(
        None, description="tokens; taken from the tokenizer when left out"
    )
    vocab_multiple: Annotated[Width, Effect.NONE] = Field(
        64,
        description="the embedding is padded to a multiple of this; padding is never sampled, "
        "exported nor counted",
    )
    embedding_size: Width | None = Field(
        None,
        description="width of a factorised embedding, projected to hidden_size and back (Lan et "
        "al. 2020); hidden_size by default",
    )
    hidden_size: Width
    num_hidden_layers: Layers
    intermediate_size: Width | None = Field(
        None, description="width of dense feed-forwards; needed where the pattern has dense layers"
    )
    max_position_embeddings: Annotated[SequenceTokens, Effect.FUNCTION] = Field(
        2048, description="longest sequence in tokens"
    )
    attention: Annotated[Attention, OneOf()]
    position: Annotated[Position, OneOf()] = Rope()
    norm: Annotated[Norm, OneOf()] = RMSNormConfig()
    norm_position: Literal["pre", "post"] = Field(
        "pre", description="'pre': x + f(norm(x)); 'post': norm(x + f(x)) (Xiong et al. 2020)"
    )
    final_norm: bool = Field(True, description="a norm between the last block and the head")
    feed_forward: Annotated[FeedForwardConfig, OneOf()] = SwiGLUConfig()
    layer_pattern: Annotated[LayerPattern, OneOf()] = AllMoE()
    moe: Annotated[MoE, OneOf()] | None = None
    dropout: Annotated[Dropout, Effect.NONE] = Dropout()
    multi_token_prediction: Annotated[MultiTokenPrediction | None, Effect.NONE] = None
    tie_word_embeddings: bool = False
    head_bias: bool = False
    # Effects: a finished model never reads what initialises and trains it.
    initializer_range: Annotated[float, Field(gt=0), Effect.NONE] = Field(
        0.02, description="standard deviation; residual projections get it / sqrt(2 * layers)"
    )
    initialization: Annotated[Initialization, OneOf(), Effect.NONE] = StandardInitialization()
    output_z_loss_weight: Annotated[Weight, Effect.NONE] = Field(
        0.0, description="weight of mean(logsumexp(output logits)^2)"
    )
    loss_chunk_tokens: Annotated[SequenceTokens, Effect.NONE] = Field(
        1024, description="tokens whose logits are in memory at once during training"
    )

    @property
    def moe_layers(self) -> list[int]:
        """The layers, from 0, that are mixtures of experts; multi-token prediction not included."""
        return [
            index for index in range(self.num_hidden_layers) if self.layer_pattern.is_moe(index)
        ]

    @property
    def routed_layers(self) -> list[int]:
        """The layers that route in training.

        With multi-token prediction its block, a copy of the last layer, is one more.
        """
        # Its block is a copy of the last layer, so it routes if that one does.
        block_routes = self.multi_token_prediction is not None and self.layer_pattern.is_moe(
            self.num_hidden_layers - 1
        )
        return self.moe_layers + [self.num_hidden_layers] * block_routes

    @property
    def routing(self) -> RoutedMoE | None:
        """The MoE section if its layers have routers; None for a dense model and for PEER."""
        return self.moe.routing if self.moe is not None and self.routed_layers else None

    @property
    def total_experts(self) -> int:
        """Routed experts of one layer; 1 for a dense model: it divides any number of ranks."""
        return self.moe.total_experts if self.moe is not None and self.routed_layers else 1

    def portable(self) -> ModelConfig:
        """The same function, computed by what runs anywhere without a further package."""
        attention = self.attention.model_copy(update={"kernel": "sdpa"})
        moe = None if self.moe is None else self.moe.portable()
        return self.model_copy(update={"attention": attention, "moe": moe})

    def moe_role(self, name: str) -> Role | None:
        """What a parameter, by its name in the model, is for in an MoE layer; None for others."""
        inner = below_feed_forward(name)
        return None if inner is None or self.moe is None else self.moe.role_of(inner)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: ``vocab_size`` rounded up to a multiple of ``vocab_multiple``."""
        if self.vocab_size is None:
            raise ValueError("vocab_size is not resolved yet")
        # Rounded up.
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


def below_feed_forward(name: str) -> str | None:
    """A parameter's name below its block's feed-forward; None for other parts of the model."""
    # Shared experts have a feed-forward inside the layer's own: the first one counts.
    _, found, inner = name.partition(".feed_forward.")
    return inner if found else None
