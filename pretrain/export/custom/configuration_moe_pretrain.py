"""The configuration of a mixture-of-experts decoder, whose parts are sections with a ``kind``."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

# A part of config.json: its "kind", and the fields of that kind.
Section = dict[str, Any]
# Sections of the smallest dense model. They are only defaults, because transformers also builds
# configurations without arguments; a checkpoint's config.json always has its own.
ROPE = {"kind": "rope", "rope_theta": 10000.0}
HEADS = {
    "kind": "gqa",
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "bias": "none",
    "qk_norm": "none",
    "sinks": False,
}


class MoePretrainConfig(PretrainedConfig):
    """Sections are plain dictionaries, as ``config.json`` holds them.

    Args:
        vocab_size: tokens; also rows of embedding and head.
        hidden_size: D, the width between the blocks.
        embedding_size: width of embedding and head, projected to D and back; D by default.
        intermediate_size: hidden units of a dense feed-forward; None if no layer has one.
        max_position_embeddings: longest sequence in tokens.
        position: kind rope, yarn, llama3, alibi, rope_alibi, learned or none.
        norm: kind rms_norm or layer_norm, and ``eps``.
        norm_position: 'pre', x + f(norm(x)), or 'post', norm(x + f(x)).
        final_norm: a norm between the last block and the head.
        attention: kind gqa or mla.
        sliding_windows: for each layer the tokens that a query sees, itself included, or None for
            all before it. None alone: no layer has one.
        feed_forward: kind swiglu, gelu, silu, clamped_swiglu or product_swiglu, of dense layers and
            experts alike; ``bias``: every matrix has one.
        moe_layers: indices of the layers that are mixtures of experts; the others are dense.
        moe: kind dropless or deepspeed, with a ``router``; None without such layers.
        head_bias: the head has a bias.
        initializer_range: standard deviation of new matrices.
    """

    model_type = "moe_pretrain"

    def __init__(
        self,
        vocab_size: int = 64,
        hidden_size: int = 8,
        num_hidden_layers: int = 1,
        embedding_size: int | None = None,
        intermediate_size: int | None = 16,
        max_position_embeddings: int = 2048,
        position: Section | None = None,
        norm: Section | None = None,
        norm_position: str = "pre",
        final_norm: bool = True,
        attention: Section | None = None,
        sliding_windows: list[int | None] | None = None,
        feed_forward: Section | None = None,
        moe_layers: list[int] | None = None,
        moe: Section | None = None,
        head_bias: bool = False,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.embedding_size = embedding_size
        self.intermediate_size = intermediate_size
        self.max_position_embeddings = max_position_embeddings
        self.position = position or dict(ROPE)
        self.norm = norm or {"kind": "rms_norm", "eps": 1e-6}
        self.norm_position = norm_position
        self.final_norm = final_norm
        self.attention = attention or dict(HEADS)
        self.sliding_windows = sliding_windows or [None] * num_hidden_layers
        self.feed_forward = feed_forward or {"kind": "swiglu", "bias": False}
        self.moe_layers = moe_layers or []
        self.moe = moe
        self.head_bias = head_bias
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        kwargs["tie_word_embeddings"] = tie_word_embeddings
        super().__init__(**kwargs)

    @property
    def drops_tokens(self) -> bool:
        """Whether a token's output depends on the other tokens of its batch."""
        return bool(self.moe_layers) and self.moe is not None and self.moe.get("drop_tokens", False)
