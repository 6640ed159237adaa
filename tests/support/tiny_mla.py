"""Small dense models with multi-head latent attention."""

from __future__ import annotations

import torch

from pretrain.model.attention.mla import MultiHeadLatentAttention
from pretrain.model.decoder import DecoderLM
from tests.support.tiny_model import random_tensor, tiny_model

B, S, D, N = 2, 16, 32, 4
Q, C, R, H, V = (
    16,
    12,
    4,
    8,
    6,
)  # ranks of the latents, then the elements of a head: rotated, not rotated, of a value
SIZES = {
    "num_attention_heads": N,
    "q_lora_rank": Q,
    "kv_lora_rank": C,
    "qk_rope_head_dim": R,
    "qk_nope_head_dim": H,
    "v_head_dim": V,
}
DENSE = ("model.moe=null", "model.layer_pattern.kind=all_dense", "model.intermediate_size=24")
YARN = {"factor": 40.0, "original_max_position_embeddings": 16, "beta_fast": 32.0, "beta_slow": 1.0}
POSITIONS = {
    "rope": "{kind: rope}",
    "yarn": (
        "{kind: yarn, factor: 40, original_max_position_embeddings: 16, mscale: 0.7,"
        " mscale_all_dim: 1.0}"
    ),
    "alibi": "{kind: alibi}",
    "rope_alibi": "{kind: rope_alibi}",
    "learned": "{kind: learned}",
    "none": "{kind: none}",
}
OPTIONS = {
    "plain": "",
    "no_query_latent": "q_lora_rank: null",
    "biases": "bias: all, sinks: true",
    "wide_values": "v_head_dim: 14",
    "window": "sliding_window: 5, full_attention_every: 2, sinks: true",
}


def latent(options: str = "", decode: str = "absorbed") -> str:
    """The override that chooses this attention."""
    fields = {name: str(value) for name, value in SIZES.items()} | {"decode": decode}
    fields |= dict(item.split(": ") for item in options.split(", ") if item)
    return (
        "model.attention={kind: mla, "
        + ", ".join(f"{name}: {value}" for name, value in fields.items())
        + "}"
    )


def build(
    options: str = "", position: str = "rope", *overrides: str, decode: str = "absorbed"
) -> DecoderLM:
    """A dense model whose biases and sinks are not zero, and whose norms are not one, so that they
    show.
    """
    model = tiny_model(
        *DENSE, latent(options, decode), f"model.position={POSITIONS[position]}", *overrides
    )
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if name.endswith((".bias", ".sinks")):
            parameter.data = random_tensor(*parameter.shape, seed=index).detach()
        if name.endswith("a_norm.weight"):
            parameter.data = 1 + 0.3 * random_tensor(*parameter.shape, seed=index).detach()
    return model.eval()


def layer_of(model: DecoderLM, layer: int = 0) -> MultiHeadLatentAttention:
    attention = model.layers[layer].attention
    assert isinstance(attention, MultiHeadLatentAttention)
    return attention


@torch.no_grad()
def decode(model: DecoderLM, input_ids_BS: torch.Tensor, parts: list[int]) -> torch.Tensor:
    """Logits of all tokens, some at a time, through the cache."""
    cache = model.new_cache(input_ids_BS.shape[0], input_ids_BS.shape[1], "cpu", torch.float32)
    return torch.cat(
        [model.logits(part, cache=cache) for part in input_ids_BS.split(parts, dim=1)], dim=1
    )


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())
