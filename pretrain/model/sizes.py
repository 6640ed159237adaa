"""Parameters, FLOPs and memory of a model, before a single tensor exists."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pretrain.config.model_schema import DeepSpeedMoE, ModelConfig
from pretrain.config.schema import Recipe
from pretrain.model.decoder import DecoderLM

# Dense bf16 peak without sparsity, FLOP/s, from the vendors' data sheets; the key is part of torch's device name.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "L4": 121e12,
    "4090": 165e12,
}


@dataclass(frozen=True)
class ModelSize:
    """Attributes:
    parameters_total: all weights, vocabulary padding included.
    parameters_active: all but the routed experts, plus top_k of them a MoE layer.
    parameters_experts: routed experts only.
    flops_per_token: forward and backward: 6 a matrix weight used, plus 6 * L * S * N * H for causal attention.
    """

    parameters_total: int
    parameters_active: int
    parameters_experts: int
    flops_per_token: float


def model_size(config: ModelConfig, sequence_length: int) -> ModelSize:
    """Counts on the meta device: exact, and instant for any size."""
    with torch.device("meta"):
        model = DecoderLM(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = sum(parameter.numel() for parameter in model.parameters() if not getattr(parameter, "allreduce", True))
    unused = experts - experts * config.moe.top_k // config.moe.num_experts if config.moe else 0
    lookup = 0 if config.tie_word_embeddings else model.embedding.weight.numel()
    heads = config.attention.num_attention_heads * config.attention.head_dim
    attention = 6.0 * config.num_hidden_layers * sequence_length * heads
    return ModelSize(total, total - unused, experts, 6.0 * (total - unused - lookup) + attention)


def state_bytes_per_rank(size: ModelSize, recipe: Recipe, precision: str, zero_stage: int, world_size: int) -> dict[str, int]:
    """Bytes of weights, gradients and AdamW state on one rank; activations come on top.

    ZeRO (Rajbhandari et al. 2020): stage 1 shards the optimizer state over the ranks that hold the same weights, stage 2 also gradients,
    stage 3 also weights. Experts are replicated on world_size / ep_size ranks only.
    """
    ep_size = recipe.parallel.ep_size
    width = 4 if precision == "fp32" else 2
    master = 0 if precision == "fp32" and zero_stage == 0 else 4
    dense = size.parameters_total - size.parameters_experts
    parts = {"weights": 0.0, "gradients": 0.0, "optimizer": 0.0}
    for count, replicas in ((dense, world_size), (size.parameters_experts / ep_size, world_size / ep_size)):
        parts["weights"] += count * width / (replicas if zero_stage == 3 else 1)
        parts["gradients"] += count * width / (replicas if zero_stage >= 2 else 1)
        parts["optimizer"] += count * (8 + master) / (replicas if zero_stage >= 1 else 1)
    return {name: int(value) for name, value in parts.items()} | {"total": int(sum(parts.values()))}


def activation_bytes(recipe: Recipe, precision: str) -> int:
    """A rough count of what one micro batch keeps for the backward pass; with checkpointing one input a block, and one block's working set."""
    config, train = recipe.model, recipe.train
    tokens = train.micro_batch_size * train.sequence_length
    width = 4 if precision == "fp32" else 2
    heads = config.attention.head_dim * (2 * config.attention.num_attention_heads + 2 * config.attention.num_key_value_heads)
    per_layer = []
    for layer in range(config.num_hidden_layers):
        feed_forward = 4 * (config.intermediate_size or 0)
        if config.layer_pattern.is_moe(layer) and config.moe is not None:
            capacity = config.moe.capacity_factor if isinstance(config.moe, DeepSpeedMoE) and config.moe.drop_tokens else 1.0
            feed_forward = int(config.moe.top_k * capacity * (4 * config.moe.moe_intermediate_size + 4 * config.hidden_size))
        per_layer.append(tokens * width * (6 * config.hidden_size + 2 * heads + feed_forward))
    blocks = max(per_layer) + len(per_layer) * tokens * width * config.hidden_size if train.activation_checkpointing else sum(per_layer)
    logits = 3 * 4 * min(tokens, config.loss_chunk_tokens) * config.padded_vocab_size
    return blocks + logits


def peak_flops(device: torch.device, precision: str) -> float | None:
    """The device's bf16/fp16 peak where a data sheet is known, else None."""
    if device.type != "cuda" or precision == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)
