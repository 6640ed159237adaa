"""The attention section of a recipe's model: one class per kind of attention."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from pretrain.core.errors import ConfigError
from pretrain.core.registry import Component, NameOf
from pretrain.core.section import Effect, Positive, Width
from pretrain.model.attention.kernels.config import Kernel


class Attention(Component):
    """What every kind of attention has.

    Attributes:
        rotary_field: the field that gives its ``rotary_dim``.
    """

    rotary_field: ClassVar[str]

    num_attention_heads: Width
    sliding_window: Annotated[Positive | None, Effect.FUNCTION] = Field(
        None, description="tokens a query sees, itself included; all before it by default"
    )
    full_attention_every: Annotated[Positive | None, Effect.FUNCTION] = Field(
        None, description="with a window: layer i sees everything if (i + 1) % n == 0"
    )
    sinks: bool = Field(
        False,
        description="a learned logit a head that takes part in the softmax and adds nothing (Xiao "
        "et al. 2023; gpt-oss)",
    )
    kernel: Annotated[str, NameOf(Kernel), Effect.NONE] = Field(
        "auto",
        description="'auto': the fastest for the device and the mask, sdpa on a CPU; 'reference': "
        "the plain fp32 form that tests compare with",
    )

    @model_validator(mode="after")
    def _windows_fit(self) -> Attention:
        if self.full_attention_every is not None and self.sliding_window is None:
            raise ValueError(
                "full_attention_every says which layers have no window, but there is no "
                "sliding_window"
            )
        return self

    def window(self, layer: int) -> int | None:
        """Tokens that a query of ``layer`` (from 0) sees, or None for all before it."""
        # Counted from 1, so that the last layer of each group of n sees everything.
        if self.full_attention_every is not None and (layer + 1) % self.full_attention_every == 0:
            return None
        return self.sliding_window

    @property
    @abstractmethod
    def rotary_dim(self) -> int:
        """Elements of a head that a rotary embedding rotates."""

    @property
    @abstractmethod
    def score_dim(self) -> int:
        """Elements of all heads together that one score is the product of.

        With :attr:`value_dim` it determines the FLOPs.
        """

    @property
    @abstractmethod
    def value_dim(self) -> int:
        """Elements of all heads together that scores are multiplied with."""

    @property
    @abstractmethod
    def cached_per_token(self) -> int:
        """Elements per token in one layer's cache."""

    @property
    def trained_per_token(self) -> int:
        """Elements of a token's keys and values in training."""
        return self.cached_per_token

    @property
    def trained_key_heads(self) -> int:
        """Heads of keys and values that a kernel gets in training."""
        return self.num_attention_heads

    @property
    @abstractmethod
    def widest_head(self) -> int:
        """Elements of the widest head that a kernel gets, in training or with a cache."""

    @property
    @abstractmethod
    def trained_head(self) -> int:
        """Elements of the widest head that a kernel gets without a cache."""

    @property
    def attended_latents(self) -> tuple[int, int] | None:
        """Elements cached of a token, and of its latent alone; None if no step attends to them."""
        return None

    @property
    @abstractmethod
    def query_width(self) -> int:
        """Elements of one head's query; scores are divided by its square root."""

    @property
    def query_scales(self) -> tuple[str, ...]:
        """The tensors that scores grow with, for muP; () if the kind's heads never become wider."""
        return ()

    @property
    def has_latents(self) -> bool:
        """Whether keys and values are computed from latents, which have norms of their own."""
        return False

    def check(self, path: str) -> None:
        """Check that sizes can be combined.

        Args:
            path: of the section, for the error sentence.

        Raises:
            ConfigError: if they cannot.
        """
        return


class GroupedQueryAttentionConfig(Attention):
    """Grouped-query attention (Ainslie et al. 2023).

    Equal head counts make it multi-head, a single key/value head makes it multi-query attention.
    """

    implementation: ClassVar[str] = "pretrain.model.attention.gqa:GroupedQueryAttention"
    rotary_field: ClassVar[str] = "head_dim"
    kind: Literal["gqa"] = "gqa"
    num_key_value_heads: Width
    head_dim: Width
    bias: Literal["none", "qkv", "all"] = Field(
        "none",
        description="which projections have one: none, queries keys and values, or the output too",
    )
    qk_norm: Literal["none", "head", "full"] = Field(
        "none",
        description="RMSNorm of queries and keys before their rotation: over each head (Qwen3) or "
        "over all heads together (OLMoE)",
    )

    @property
    def rotary_dim(self) -> int:
        return self.head_dim

    @property
    def trained_key_heads(self) -> int:
        return self.num_key_value_heads

    @property
    def score_dim(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def value_dim(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def cached_per_token(self) -> int:
        return 2 * self.num_key_value_heads * self.head_dim

    @property
    def widest_head(self) -> int:
        return self.head_dim

    @property
    def trained_head(self) -> int:
        return self.head_dim

    @property
    def query_width(self) -> int:
        return self.head_dim

    @property
    def query_scales(self) -> tuple[str, ...]:
        """A norm removes whatever scale the projection has, so the norm's own weight carries it."""
        # Scores are bilinear: scaling the queries alone is enough.
        return ("q_proj.weight", "q_proj.bias") if self.qk_norm == "none" else ("q_norm.weight",)

    def check(self, path: str) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"{path}.num_attention_heads ({self.num_attention_heads}) is no multiple of "
                f"num_key_value_heads ({self.num_key_value_heads}): change one of them"
            )


class MultiHeadLatentAttentionConfig(Attention):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    All heads' keys and values are computed from one latent per token; in addition, each head sees
    one rotated key that all heads share. The cache keeps the latent and that key.
    """

    implementation: ClassVar[str] = "pretrain.model.attention.mla:MultiHeadLatentAttention"
    rotary_field: ClassVar[str] = "qk_rope_head_dim"
    kind: Literal["mla"]
    q_lora_rank: Width | None = Field(
        None,
        description="elements of the latent that queries are made of; of the hidden state by "
        "default",
    )
    kv_lora_rank: Width = Field(
        description="elements of the latent that keys and values are made of"
    )
    qk_rope_head_dim: Width = Field(
        description="elements of a query, and of the shared key, that are rotated"
    )
    qk_nope_head_dim: Width = Field(description="elements of a head's own key, never rotated")
    v_head_dim: Width
    latent_norm: Literal["rms_norm", "layer_norm"] = Field(
        "rms_norm", description="of both latents; DeepSeek's is rms_norm"
    )
    bias: Literal["none", "all"] = Field(
        "none", description="'all': q_a_proj, kv_a_proj and o_proj (Hugging Face's attention_bias)"
    )
    decode: Annotated[Literal["absorbed", "plain"], Effect.NONE] = Field(
        "absorbed",
        description="with a cache: attend to latents where that multiplies less, or always make "
        "keys and values of them",
    )

    @property
    def rotary_dim(self) -> int:
        return self.qk_rope_head_dim

    @property
    def score_dim(self) -> int:
        return self.num_attention_heads * (self.qk_nope_head_dim + self.qk_rope_head_dim)

    @property
    def value_dim(self) -> int:
        return self.num_attention_heads * self.v_head_dim

    @property
    def cached_per_token(self) -> int:
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def trained_per_token(self) -> int:
        # Training expands the latents: keys and values of all heads exist next to them.
        return self.score_dim + self.value_dim + self.cached_per_token

    @property
    def query_width(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def has_latents(self) -> bool:
        return True

    @property
    def attended_latents(self) -> tuple[int, int] | None:
        sizes = self.cached_per_token, self.kv_lora_rank
        return sizes if self.decode == "absorbed" else None

    @property
    def widest_head(self) -> int:
        # Absorbed, the latent with its shared key is one head.
        absorbed = self.cached_per_token if self.decode == "absorbed" else 0
        return max(self.trained_head, absorbed)

    @property
    def trained_head(self) -> int:
        return max(self.query_width, self.v_head_dim)
