"""The models of the GPU measurements: 16 layers like those of moe_1b, coarse and fine-grained."""

from __future__ import annotations

from pretrain.config.load import load_recipe
from pretrain.config.recipe import Recipe

VOCABULARY = 32_000
SHARED = (
    f"model.vocab_size={VOCABULARY}",
    "parallel.ep_size=1",
    "train.activation_checkpointing=false",
    "train.precision=bf16",
)
WIDE = (
    "model.hidden_size=2048",
    "model.attention={kind: gqa, num_attention_heads: 16, num_key_value_heads: 4, head_dim: 128,"
    " qk_norm: head}",
)
# Name -> settings of moe_1b: 8 experts with 2 a token (Mixtral), 64 with 6 (DeepSeekMoE).
MODELS: dict[str, tuple[str, ...]] = {
    "moe_1b": (),
    "coarse": (
        *WIDE,
        "model.moe.num_experts=8",
        "model.moe.top_k=2",
        "model.moe.moe_intermediate_size=5632",
    ),
    "fine": (
        *WIDE,
        "model.moe.num_experts=64",
        "model.moe.top_k=6",
        "model.moe.moe_intermediate_size=1408",
    ),
}
# What a quick run has in place of these sizes: a typo shows itself on any machine.
TINY = (
    "model.hidden_size=64",
    "model.num_hidden_layers=2",
    "model.attention={kind: gqa, num_attention_heads: 2, num_key_value_heads: 1, head_dim: 32,"
    " qk_norm: head}",
    "model.moe.moe_intermediate_size=32",
    "train.sequence_length=64",
)


def recipe_of(name: str, *overrides: str, tiny: bool = False) -> Recipe:
    """A model of ``MODELS`` as a recipe for one rank."""
    return load_recipe("moe_1b", [*SHARED, *MODELS[name], *(TINY if tiny else ()), *overrides])
