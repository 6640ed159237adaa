"""One smallest recipe for each registered kind: what the contract tests run.

A new kind is among them as soon as it is imported.
"""

from __future__ import annotations

from typing import get_args

from pretrain.core.registry import kinds_of
from pretrain.core.section import Section
from pretrain.model.attention.config import Attention
from pretrain.model.config import FeedForwardConfig, LayerPattern, Norm
from pretrain.model.moe.config import MoE
from pretrain.model.moe.routers import Router
from pretrain.model.positions.config import Position

FAMILIES: dict[str, type[Section]] = {
    "attention": Attention,
    "position": Position,
    "norm": Norm,
    "feed_forward": FeedForwardConfig,
    "layer_pattern": LayerPattern,
    "moe": MoE,
    "moe.router": Router,
}
YARN = "factor: 4, original_max_position_embeddings: 16"
LATENT = (
    "q_lora_rank: 16, kv_lora_rank: 12, qk_rope_head_dim: 4, qk_nope_head_dim: 8, v_head_dim: 6"
)
PEER = (
    "product_key_sizes: [4, 3, 2], query_dim: 12, num_heads: 2, top_k: 3, moe_intermediate_size: 2,"
    " num_shared_experts: 1"
)
# What a kind needs beside its name, or is more telling with, as overrides of the debug recipe.
NEEDED: dict[tuple[str, str], list[str]] = {
    ("attention", "gqa"): ["model.attention.num_key_value_heads=1"],
    ("attention", "mla"): [f"model.attention={{kind: mla, num_attention_heads: 4, {LATENT}}}"],
    ("position", "yarn"): [f"model.position={{kind: yarn, {YARN}}}"],
    ("position", "llama3"): [
        "model.position={kind: llama3, factor: 4, original_max_position_embeddings: 16}"
    ],
    ("feed_forward", "swiglu"): ["model.feed_forward.bias=true"],
    ("feed_forward", "gelu"): ["model.feed_forward={kind: gelu, bias: true}"],
    ("feed_forward", "clamped_swiglu"): ["model.feed_forward={kind: clamped_swiglu, bias: true}"],
    ("feed_forward", "product_swiglu"): ["model.feed_forward={kind: product_swiglu, bias: true}"],
    ("layer_pattern", "all_dense"): [
        "model.layer_pattern.kind=all_dense",
        "model.intermediate_size=32",
    ],
    ("layer_pattern", "every_nth"): [
        "model.layer_pattern={kind: every_nth, n: 2}",
        "model.intermediate_size=32",
    ],
    ("layer_pattern", "first_k_dense"): [
        "model.layer_pattern={kind: first_k_dense, k: 1}",
        "model.intermediate_size=32",
    ],
    ("moe", "dropless"): ["model.moe.num_shared_experts=1"],
    ("moe", "deepspeed"): ["model.moe.kind=deepspeed", "model.moe.drop_tokens=false"],
    ("moe", "peer"): [f"model.moe={{kind: peer, {PEER}}}"],
    ("moe.router", "softmax_topk"): ["model.moe.router.temperature=2"],
    ("moe.router", "sigmoid_topk"): [
        "model.moe.router.kind=sigmoid_topk",
        "model.moe.bias_balancing={}",
    ],
}
# Options that are no kinds of their own, but change what is computed.
OPTIONS: dict[str, list[str]] = {
    "sliding window": [
        "model.attention.sliding_window=5",
        "model.attention.full_attention_every=2",
    ],
    "attention sinks": ["model.attention.sinks=true"],
    "qk norm over all heads": ["model.attention.qk_norm=full"],
    "attention biases": ["model.attention.bias=all"],
    "post-norm": ["model.norm_position=post", "model.final_norm=false"],
    "factorised tied embedding": [
        "model.embedding_size=16",
        "model.tie_word_embeddings=true",
        "model.head_bias=true",
    ],
    "groups of experts": [
        "model.moe.router.groups={num_groups: 2, top_k_groups: 1, score: top2_sum}"
    ],
    "gated shared experts": ["model.moe.num_shared_experts=2", "model.moe.shared_expert_gate=true"],
    "every router loss": [
        "model.moe.sequence_loss_weight=0.1",
        "model.moe.cv_loss_weight=0.1",
        "model.moe.entropy_loss_weight=0.1",
    ],
    "a router of ours in DeepSpeed's layer": [
        "model.moe.kind=deepspeed",
        "model.moe.gate=router",
        "model.moe.drop_tokens=false",
    ],
    "query norm by running statistics": [
        f"model.moe={{kind: peer, {PEER}, query_norm: batch_norm, query_bias: true}}"
    ],
    "experts of one hidden number without a gate": [
        "model.feed_forward.kind=gelu",
        f"model.moe={{kind: peer, {PEER}}}",
        "model.moe.moe_intermediate_size=1",
    ],
    "multi-token prediction": ["model.multi_token_prediction={}"],
}


def registered() -> list[tuple[str, str]]:
    """Every (family, kind) that a recipe may name."""
    return [
        (name, get_args(kind.model_fields["kind"].annotation)[0])
        for name, family in FAMILIES.items()
        for kind in kinds_of(family)
    ]


KINDS: dict[tuple[str, str], list[str]] = {
    one: NEEDED.get(one, [f"model.{one[0]}.kind={one[1]}"]) for one in registered()
}
CASES: dict[str, list[str]] = {
    f"{family}={kind}": overrides for (family, kind), overrides in KINDS.items()
} | OPTIONS
