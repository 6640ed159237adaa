"""The position section of a recipe's model: one class per kind of position encoding."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from pretrain.core.registry import Component
from pretrain.core.section import Effect, Positive, Section

Growth = Annotated[float, Field(gt=0)]


class Position(Component):
    """What every kind of position encoding has.

    Attributes:
        rotary: whether it rotates queries and keys.
        alibi: whether it adds ALiBi's biases to scores.
        bounded: whether it has something for the first ``max_position_embeddings`` positions only.
    """

    rotary: ClassVar[bool] = False
    alibi: ClassVar[bool] = False
    bounded: ClassVar[bool] = False

    def keeps_the_meaning_of(self, other: Section) -> bool:
        """If both encode positions in the same way.

        Further tensors of a kind have names that the other one lacks.
        """
        return isinstance(other, Position) and (self.rotary, self.alibi) == (
            other.rotary,
            other.alibi,
        )


class RotaryBase(Position):
    """What every kind with a rotary embedding has."""

    rotary: ClassVar[bool] = True
    rope_theta: Annotated[float, Field(gt=1), Effect.FUNCTION] = 10000.0


class Rope(RotaryBase):
    """Rotary position embedding (Su et al. 2021), half-split layout as in Hugging Face's Llama."""

    implementation: ClassVar[str] = "pretrain.model.positions.rope:RopePosition"
    kind: Literal["rope"] = "rope"


class Yarn(RotaryBase):
    """YaRN (Peng et al. 2023): NTK by parts.

    Slow pairs are interpolated by ``factor``, fast ones are kept, and a ramp blends between them.
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
        # Equal ends would make the ramp a step at an arbitrary pair.
        if self.beta_fast <= self.beta_slow:
            raise ValueError(
                f"beta_fast ({self.beta_fast}) must be larger than beta_slow ({self.beta_slow})"
            )
        return self

    @model_validator(mode="after")
    def _scale_is_said_once(self) -> Yarn:
        # DeepSeek's attention factor is a quotient of both: one alone has no meaning.
        if (self.mscale is None) != (self.mscale_all_dim is None):
            raise ValueError("mscale and mscale_all_dim go together: give both or none")
        if self.mscale is not None and self.attention_factor is not None:
            raise ValueError("attention_factor and mscale say the same: leave one out")
        return self


class Llama3(RotaryBase):
    """Llama 3.1's stretched rotary embedding.

    Slow pairs are interpolated by ``factor``, fast ones are kept, and the rest is blended.
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
    """A learned vector per position, added to the embedding (Vaswani et al. 2017, GPT-2).

    There are ``max_position_embeddings`` of them.
    """

    implementation: ClassVar[str] = "pretrain.model.positions.learned:LearnedPosition"
    bounded: ClassVar[bool] = True
    kind: Literal["learned"]


class NoPositionConfig(Position):
    """No encoding: the order shows in the causal mask alone (NoPE, Kazemnejad et al. 2023)."""

    implementation: ClassVar[str] = "pretrain.model.positions.none:NoPosition"
    kind: Literal["none"]
