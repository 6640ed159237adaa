"""The model section of a recipe: one class a kind of component, and the model that they make up."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from pretrain.core.registry import Component, OneOf
from pretrain.core.section import Effect, NonNegative, Positive, Section
from pretrain.model.attention.config import Attention
from pretrain.model.init_config import Initialization, StandardInitialization
from pretrain.model.moe.config import MoE, Role, RoutedMoE

Weight = Annotated[float, Field(ge=0)]
Growth = Annotated[float, Field(gt=0)]
Rate = Annotated[float, Field(ge=0, lt=1)]

# --- norms ---


class Norm(Component):
    eps: Annotated[float, Field(gt=0), Effect.FUNCTION] = 1e-6


class RMSNormConfig(Norm):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019)."""

    implementation: ClassVar[str] = "pretrain.model.norm:RMSNorm"
    kind: Literal["rms_norm"] = "rms_norm"


class LayerNormConfig(Norm):
    """(x - mean) / sqrt(variance + eps) * weight + bias (Ba et al. 2016)."""

    implementation: ClassVar[str] = "pretrain.model.norm:LayerNorm"
    kind: Literal["layer_norm"]


# --- positions ---


class Position(Component):
    rotary: ClassVar[bool] = False
    alibi: ClassVar[bool] = False

    def keeps_the_meaning_of(self, other: Section) -> bool:
        """If both encode positions in the same way.

        What else a kind has are tensors of its own.
        """
        return isinstance(other, Position) and (self.rotary, self.alibi) == (
            other.rotary,
            other.alibi,
        )


class RotaryBase(Position):
    rotary: ClassVar[bool] = True
    rope_theta: Annotated[float, Field(gt=1), Effect.FUNCTION] = 10000.0


class Rope(RotaryBase):
    """Rotary position embedding (Su et al. 2021), half-split layout as in Hugging Face's Llama."""

    implementation: ClassVar[str] = "pretrain.model.positions.rope:RopePosition"
    kind: Literal["rope"] = "rope"


class Yarn(RotaryBase):
    """YaRN (Peng et al. 2023): slow pairs are interpolated by ``factor``, fast ones kept, the rest
    ramps between (NTK by parts).
    """

    implementation: ClassVar[str] = "pretrain.model.positions.yarn:YarnPosition"
    kind: Literal["yarn"]
    factor: Annotated[float, Field(ge=1), Effect.FUNCTION] = Field(
        description="longest sequence / original_max_position_embeddings"
    )
    original_max_position_embeddings: Annotated[Positive, Effect.FUNCTION] = Field(
        description="tokens the frequencies were trained for"
    )
    beta_fast: Annotated[float, Field(gt=0), Effect.FUNCTION] = Field(
        32.0, description="pairs that rotate more often than this over the original length are kept"
    )
    beta_slow: Annotated[float, Field(gt=0), Effect.FUNCTION] = Field(
        1.0, description="pairs that rotate less often than this are interpolated"
    )
    attention_factor: Annotated[Growth | None, Effect.FUNCTION] = Field(
        None, description="scale of rotated queries and keys; 0.1 ln(factor) + 1 by default"
    )
    mscale: Annotated[Growth | None, Effect.FUNCTION] = Field(
        None,
        description="attention_factor is (0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim "
        "ln(factor) + 1)",
    )
    mscale_all_dim: Annotated[Growth | None, Effect.FUNCTION] = Field(
        None,
        description="all scores grow by (0.1 mscale_all_dim ln(factor) + 1)^2, rotated or not "
        "(DeepSeek-V3's code)",
    )
    truncate: Annotated[bool, Effect.FUNCTION] = Field(
        True,
        description="round the ramp's ends outwards to whole pairs (Hugging Face's default; "
        "gpt-oss does not)",
    )

    @model_validator(mode="after")
    def _ramp_rises(self) -> Yarn:
        if self.beta_fast <= self.beta_slow:
            raise ValueError(
                f"beta_fast ({self.beta_fast}) must be larger than beta_slow ({self.beta_slow})"
            )
        return self

    @model_validator(mode="after")
    def _scale_is_said_once(self) -> Yarn:
        if (self.mscale is None) != (self.mscale_all_dim is None):
            raise ValueError("mscale and mscale_all_dim go together: give both or none")
        if self.mscale is not None and self.attention_factor is not None:
            raise ValueError("attention_factor and mscale say the same: leave one out")
        return self


class Llama3(RotaryBase):
    """Llama 3.1's stretched rotary embedding: slow pairs are interpolated by ``factor``, fast ones
    kept, the rest blends between.
    """

    implementation: ClassVar[str] = "pretrain.model.positions.llama3:Llama3Position"
    kind: Literal["llama3"]
    factor: Annotated[float, Field(ge=1)] = Field(
        description="what the frequency of slow pairs is divided by"
    )
    original_max_position_embeddings: Positive = Field(
        description="tokens the frequencies were trained for"
    )
    low_freq_factor: Annotated[float, Field(gt=0)] = Field(
        1.0,
        description="pairs that rotate less often than this over the original length are "
        "interpolated",
    )
    high_freq_factor: Annotated[float, Field(gt=0)] = Field(
        4.0, description="pairs that rotate more often than this over the original length are kept"
    )

    @model_validator(mode="after")
    def _blend_has_a_width(self) -> Llama3:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor ({self.high_freq_factor}) must be larger than low_freq_factor "
                f"({self.low_freq_factor})"
            )
        return self


class Alibi(Position):
    """Attention with linear biases (Press et al. 2022): a key n tokens back gets -slope * n."""

    implementation: ClassVar[str] = "pretrain.model.positions.alibi:AlibiPosition"
    alibi: ClassVar[bool] = True
    kind: Literal["alibi"]


class RopeAlibi(RotaryBase):
    """Both at once, as in H64LM: rotated queries and keys, and ALiBi's penalty on their scores."""

    implementation: ClassVar[str] = "pretrain.model.positions.alibi:RopeAlibiPosition"
    alibi: ClassVar[bool] = True
    kind: Literal["rope_alibi"]


class Learned(Position):
    """A learned vector for each of ``max_position_embeddings`` positions, added to the embedding
    (Vaswani et al. 2017, GPT-2).
    """

    implementation: ClassVar[str] = "pretrain.model.positions.learned:LearnedPosition"
    kind: Literal["learned"]


class NoPositionConfig(Position):
    """None: the order shows in the causal mask alone (NoPE, Kazemnejad et al. 2023)."""

    implementation: ClassVar[str] = "pretrain.model.positions.none:NoPosition"
    kind: Literal["none"]


# --- feed-forwards: also the form of one expert ---


class FeedForwardConfig(Component):
    """What every kind has.

    Attributes:
        gated: two matrices before the activation, ``gate_proj`` and ``up_proj``; else ``up_proj``
            only.
        expansion: rows of each of these for one hidden unit.
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
        """Elements kept for the backward pass a hidden unit: products, activation, dropout."""
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
    limit: Annotated[float, Field(gt=0), Effect.FUNCTION] = 7.0
    alpha: Annotated[float, Field(gt=0), Effect.FUNCTION] = 1.702


class ClampedSwiGLUConfig(Clamped):
    """down(g * sigmoid(alpha * g) * (u + 1)) with g at most ``limit`` and u within it (gpt-oss)."""

    implementation: ClassVar[str] = "pretrain.model.feed_forward:ClampedSwiGLU"
    kind: Literal["clamped_swiglu"]


class ProductSwiGLUConfig(Clamped):
    """As :class:`ClampedSwiGLU`, of the interleaved halves of gate(x) * up(x), each twice as wide
    (Project 828).

    Before its clamp the product grows with the square of x: spikes of the gradient are to be
    expected.
    """

    implementation: ClassVar[str] = "pretrain.model.feed_forward:ProductSwiGLU"
    expansion: ClassVar[int] = 2
    kind: Literal["product_swiglu"]


# --- which layers are mixtures of experts ---


class LayerPattern(Section):
    @abstractmethod
    def is_moe(self, layer: int) -> bool:
        """Whether layer ``layer`` (from 0) is a mixture of experts."""

    def keeps_the_meaning_of(self, other: Section) -> bool:
        """Always: dense layers and mixtures of experts have tensors of other names."""
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
    """Layer i is a mixture of experts where (i + 1) % n == 0, Hugging Face's
    ``decoder_sparse_step``.
    """

    kind: Literal["every_nth"]
    n: Positive

    def is_moe(self, layer: int) -> bool:
        return (layer + 1) % self.n == 0


class FirstKDense(LayerPattern):
    """The first k layers are dense, the others mixtures of experts (DeepSeek's
    ``first_k_dense_replace``).
    """

    kind: Literal["first_k_dense"]
    k: NonNegative

    def is_moe(self, layer: int) -> bool:
        return layer >= self.k


# --- the model ---


class Dropout(Section):
    """Shares of elements that are zeroed in training, the others scaled up (Srivastava et al.
    2014).
    """

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
    """One more block that predicts the token after the next (DeepSeek-V3, section 2.2, depth 1),
    with the model's embedding and head.
    """

    loss_weight: Annotated[float, Field(gt=0)] = 0.3


class ModelConfig(Section):
    """A decoder-only transformer: embedding, blocks of attention and feed-forward, head."""

    vocab_size: Annotated[Positive | None, Effect.FUNCTION] = Field(
        None, description="tokens; taken from the tokenizer when left out"
    )
    vocab_multiple: Annotated[Positive, Effect.NONE] = Field(
        64,
        description="the embedding is padded to a multiple of this; padding is never sampled, "
        "exported nor counted",
    )
    embedding_size: Positive | None = Field(
        None,
        description="width of a factorised embedding, projected to hidden_size and back (Lan et "
        "al. 2020); hidden_size by default",
    )
    hidden_size: Positive
    num_hidden_layers: Positive
    intermediate_size: Positive | None = Field(
        None, description="width of dense feed-forwards; needed where the pattern has dense layers"
    )
    max_position_embeddings: Annotated[Positive, Effect.FUNCTION] = Field(
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
    initializer_range: Annotated[float, Field(gt=0), Effect.NONE] = Field(
        0.02, description="standard deviation; residual projections get it / sqrt(2 * layers)"
    )
    initialization: Annotated[Initialization, OneOf(), Effect.NONE] = StandardInitialization()
    output_z_loss_weight: Annotated[Weight, Effect.NONE] = Field(
        0.0, description="weight of mean(logsumexp(output logits)^2)"
    )
    loss_chunk_tokens: Annotated[Positive, Effect.NONE] = Field(
        1024, description="tokens whose logits are in memory at once during training"
    )

    @property
    def moe_layers(self) -> list[int]:
        """The layers, from 0, that are mixtures of experts.

        Without the block of multi-token prediction.
        """
        return [
            index for index in range(self.num_hidden_layers) if self.layer_pattern.is_moe(index)
        ]

    @property
    def routed_layers(self) -> list[int]:
        """The layers that route in training: the block of multi-token prediction, a copy of the
        last layer, is one more.
        """
        block_routes = self.multi_token_prediction is not None and self.layer_pattern.is_moe(
            self.num_hidden_layers - 1
        )
        return self.moe_layers + [self.num_hidden_layers] * block_routes

    @property
    def routing(self) -> RoutedMoE | None:
        """The MoE section if its layers have routers; None for a dense model, and for PEER."""
        return self.moe.routing if self.moe is not None and self.routed_layers else None

    @property
    def total_experts(self) -> int:
        """Routed experts of one layer; 1 for a dense model, which any number of ranks divides."""
        return self.moe.total_experts if self.moe is not None and self.routed_layers else 1

    def moe_role(self, name: str) -> Role | None:
        """What a parameter is for in an MoE layer, by its name in the model.

        None for all others.
        """
        inner = below_feed_forward(name)
        return None if inner is None or self.moe is None else self.moe.role_of(inner)

    @property
    def padded_vocab_size(self) -> int:
        if self.vocab_size is None:
            raise ValueError("vocab_size is not resolved yet")
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


def below_feed_forward(name: str) -> str | None:
    """A parameter's name below its block's feed-forward; None for other parts of the model."""
    # Shared experts have a feed-forward inside the layer's own: the first one counts.
    _, found, inner = name.partition(".feed_forward.")
    return inner if found else None
