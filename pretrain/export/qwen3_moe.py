"""Our decoder as transformers' ``qwen3_moe``: softmax top-k routing, QK-norm, no shared experts, dense layers anywhere."""

from __future__ import annotations

from typing import Any

from pretrain.config.attention_schema import GroupedQueryAttention
from pretrain.config.model_schema import ModelConfig, RMSNorm, Rope, SwiGLU
from pretrain.config.moe_schema import DeepSpeedMoE, DroplessMoE, RoutedMoE
from pretrain.export.name_map import Link, expand
from pretrain.model.routers import SoftmaxTopK

VOCABULARY = {"embedding.weight": "model.embed_tokens.weight"}
HEAD = {"head.weight": "lm_head.weight"}
FINAL_NORM = {"final_norm.weight": "model.norm.weight"}
EVERY_LAYER = {
    "layers.{layer}.attention_norm.weight": "model.layers.{layer}.input_layernorm.weight",
    "layers.{layer}.attention.q_proj.weight": "model.layers.{layer}.self_attn.q_proj.weight",
    "layers.{layer}.attention.k_proj.weight": "model.layers.{layer}.self_attn.k_proj.weight",
    "layers.{layer}.attention.v_proj.weight": "model.layers.{layer}.self_attn.v_proj.weight",
    "layers.{layer}.attention.o_proj.weight": "model.layers.{layer}.self_attn.o_proj.weight",
    "layers.{layer}.attention.q_norm.weight": "model.layers.{layer}.self_attn.q_norm.weight",
    "layers.{layer}.attention.k_norm.weight": "model.layers.{layer}.self_attn.k_norm.weight",
    "layers.{layer}.feed_forward_norm.weight": "model.layers.{layer}.post_attention_layernorm.weight",
}
DENSE_LAYER = {
    "layers.{layer}.feed_forward.gate_proj.weight": "model.layers.{layer}.mlp.gate_proj.weight",
    "layers.{layer}.feed_forward.up_proj.weight": "model.layers.{layer}.mlp.up_proj.weight",
    "layers.{layer}.feed_forward.down_proj.weight": "model.layers.{layer}.mlp.down_proj.weight",
}
DROPLESS_LAYER = {
    "layers.{layer}.feed_forward.router.gate.weight": "model.layers.{layer}.mlp.gate.weight",
    "layers.{layer}.feed_forward.experts.w1": "model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight",
    "layers.{layer}.feed_forward.experts.w3": "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight",
    "layers.{layer}.feed_forward.experts.w2": "model.layers.{layer}.mlp.experts.{expert}.down_proj.weight",
}
_DEEPSPEED_EXPERT = "layers.{layer}.feed_forward.deepspeed_moe.experts.deepspeed_experts.{expert}"
DEEPSPEED_LAYER = {
    "layers.{layer}.feed_forward.deepspeed_moe.gate.wg.weight": "model.layers.{layer}.mlp.gate.weight",
    _DEEPSPEED_EXPERT + ".gate_proj.weight": "model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight",
    _DEEPSPEED_EXPERT + ".up_proj.weight": "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight",
    _DEEPSPEED_EXPERT + ".down_proj.weight": "model.layers.{layer}.mlp.experts.{expert}.down_proj.weight",
}


class Qwen3Moe:
    """The target ``Qwen3MoeForCausalLM`` (transformers 4.51 and later)."""

    architecture = "Qwen3MoeForCausalLM"

    def reasons_against(self, model: ModelConfig) -> list[str]:
        """Why this architecture cannot compute what ``model`` computes, a clause each; empty when it can."""
        reasons = []
        if model.moe is None or not model.moe_layers:
            reasons.append("no layer is a mixture of experts")
        elif isinstance(model.moe, RoutedMoE):
            reasons += _reasons_against_moe(model.moe)
        else:
            reasons.append(f"model.moe is of kind {_kind(model.moe)}, and the architecture's experts have a router that scores each of them")
        attention = model.attention
        if not isinstance(attention, GroupedQueryAttention):
            reasons.append(f"model.attention is of kind {_kind(attention)}, and the architecture's is gqa")
        elif attention.qk_norm != "head":
            reasons.append(f"model.attention.qk_norm is {attention.qk_norm}, and the architecture always normalises each head of queries and keys")
        elif attention.bias != "none":
            reasons.append(f"model.attention.bias is {attention.bias}, and the architecture has one in all four projections or in none")
        if attention.sinks:
            reasons.append("model.attention.sinks is true, and the architecture has no attention sinks")
        if attention.sliding_window is not None:
            reasons.append(f"model.attention.sliding_window is {attention.sliding_window}, and the architecture's export sees everything")
        for name, only in (("position", Rope), ("norm", RMSNorm), ("feed_forward", SwiGLU)):
            if type(getattr(model, name)) is not only:
                reasons.append(f"model.{name} is of kind {_kind(getattr(model, name))}, and the architecture's is {_kind(only())}")
        if model.feed_forward.bias:
            reasons.append("model.feed_forward.bias is true, and the architecture has none")
        if model.norm_position != "pre" or not model.final_norm:
            reasons.append("the architecture has its norms before attention and feed-forwards, and one behind the last block")
        if model.embedding_size is not None:
            reasons.append(f"model.embedding_size is {model.embedding_size}, and the architecture's embedding is not factorised")
        if model.head_bias:
            reasons.append("model.head_bias is true, and the architecture's head has no bias")
        return reasons

    def links(self, model: ModelConfig) -> list[Link]:
        """A link for each tensor of the export."""
        assert isinstance(model.moe, RoutedMoE)
        experts = model.moe.num_experts
        moe_layer = _moe_layer(model.moe)
        dense_layers = [index for index in range(model.num_hidden_layers) if index not in model.moe_layers]
        return [
            *expand(VOCABULARY, rows=model.vocab_size),
            *expand(EVERY_LAYER, range(model.num_hidden_layers)),
            *expand(DENSE_LAYER, dense_layers),
            *expand(moe_layer, model.moe_layers, experts),
            *expand(FINAL_NORM),
            *([] if model.tie_word_embeddings else expand(HEAD, rows=model.vocab_size)),
        ]

    def config(self, model: ModelConfig, eod_id: int) -> dict[str, Any]:
        """The architecture's own fields of ``config.json``."""
        attention, moe = model.attention, model.moe
        assert isinstance(moe, RoutedMoE) and isinstance(attention, GroupedQueryAttention) and isinstance(model.position, Rope)
        return {
            "model_type": "qwen3_moe",
            "vocab_size": model.vocab_size,
            "hidden_size": model.hidden_size,
            "intermediate_size": model.intermediate_size or moe.moe_intermediate_size,
            "num_hidden_layers": model.num_hidden_layers,
            "num_attention_heads": attention.num_attention_heads,
            "num_key_value_heads": attention.num_key_value_heads,
            "head_dim": attention.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": model.max_position_embeddings,
            "initializer_range": model.initializer_range,
            "rms_norm_eps": model.norm.eps,
            "tie_word_embeddings": model.tie_word_embeddings,
            # Readers from before transformers 5 look for rope_theta at the top, and fall back to a default where it is missing.
            "rope_parameters": {"rope_type": "default", "rope_theta": model.position.rope_theta},
            "rope_theta": model.position.rope_theta,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "use_sliding_window": False,
            # A list of layers covers every pattern; decoder_sparse_step only the regular ones.
            "decoder_sparse_step": 1,
            "mlp_only_layers": [index for index in range(model.num_hidden_layers) if index not in model.moe_layers],
            "num_experts": moe.num_experts,
            "num_experts_per_tok": moe.top_k,
            "moe_intermediate_size": moe.moe_intermediate_size,
            "norm_topk_prob": moe.router.norm_topk_prob,
            "router_aux_loss_coef": moe.aux_loss_weight,
            "bos_token_id": eod_id,
            "eos_token_id": eod_id,
        }


def _kind(section: Any) -> str:
    return str(section.kind)


def _moe_layer(moe: RoutedMoE) -> dict[str, str]:
    """The templates of the layer's own names."""
    if isinstance(moe, DroplessMoE):
        return DROPLESS_LAYER
    gate = "deepspeed_moe.gate.router.gate.weight" if isinstance(moe, DeepSpeedMoE) and moe.gate == "router" else "deepspeed_moe.gate.wg.weight"
    return {ours.replace("deepspeed_moe.gate.wg.weight", gate): theirs for ours, theirs in DEEPSPEED_LAYER.items()}


def _reasons_against_moe(moe: RoutedMoE) -> list[str]:
    reasons = []
    router = moe.router
    if not isinstance(router, SoftmaxTopK):
        reasons.append(f"model.moe.router is of kind {_kind(router)}, and the architecture's is softmax_topk")
    elif router != SoftmaxTopK(norm_topk_prob=router.norm_topk_prob, jitter=router.jitter):
        reasons.append("model.moe.router has a bias, a temperature, a scaling factor or groups, and the architecture's has none")
    if moe.bias_balancing is not None:
        reasons.append("model.moe.bias_balancing is set, and the architecture has no bias that chooses experts")
    if moe.num_shared_experts:
        reasons.append(f"model.moe.num_shared_experts is {moe.num_shared_experts}, and the architecture has no shared experts")
    if isinstance(moe, DeepSpeedMoE):
        if moe.use_residual:
            reasons.append("model.moe.use_residual is true, and the architecture has no residual expert")
        if moe.drop_tokens:
            reasons.append("model.moe.drop_tokens is true, and the architecture never drops a token")
        if moe.top2_2nd_expert_sampling:
            reasons.append("model.moe.top2_2nd_expert_sampling is true: second experts are drawn at random at inference too")
    return reasons
