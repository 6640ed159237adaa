"""Layer patterns, parameter counts without tensors, and the shipped recipes: each builds, each ds_config resolves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pretrain.config.load import load_recipe, recipe_names
from pretrain.engine.ds_config import read_ds_config, resolve_ds_config
from pretrain.model.feed_forward import SwiGLU
from pretrain.model.moe.dropless import DroplessMoE
from pretrain.model.sizes import activation_bytes, model_size, state_bytes_per_rank
from tests.model.tiny_model import KINDS, tiny_config, tiny_model

DS_CONFIGS = sorted((Path(__file__).resolve().parents[2] / "ds_configs").glob("*.json"))
WIDE = "model.intermediate_size=48"
PATTERNS = {
    "{kind: all_moe}": [0, 1, 2, 3],
    "{kind: every_nth, n: 1}": [0, 1, 2, 3],
    "{kind: every_nth, n: 2}": [1, 3],
    "{kind: every_nth, n: 3}": [2],
    "{kind: first_k_dense, k: 0}": [0, 1, 2, 3],
    "{kind: first_k_dense, k: 3}": [3],
    "{kind: all_dense}": [],
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_pattern_says_which_layers_are_mixtures(pattern: str) -> None:
    model = tiny_model("model.num_hidden_layers=4", WIDE, f"model.layer_pattern={pattern}")
    found = [block.get_submodule("feed_forward") for block in model.layers]
    assert [index for index, module in enumerate(found) if isinstance(module, DroplessMoE)] == PATTERNS[pattern]
    assert [index for index, module in enumerate(found) if isinstance(module, SwiGLU)] == [i for i in range(4) if i not in PATTERNS[pattern]]
    assert model.config.moe_layers == PATTERNS[pattern]


@pytest.mark.parametrize(
    "overrides",
    [
        (KINDS["dropless"],),
        (KINDS["deepspeed"],),
        ("model.moe.num_shared_experts=1", "model.tie_word_embeddings=true"),
        (WIDE, "model.layer_pattern={kind: first_k_dense, k: 1}", "model.attention.qk_norm=false"),
        (WIDE, "model.layer_pattern={kind: all_dense}"),
    ],
)
def test_counts_without_tensors_are_those_of_the_real_model(overrides: tuple[str, ...]) -> None:
    size, model = model_size(tiny_config(*overrides), sequence_length=16), tiny_model(*overrides)
    experts = sum(parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name)
    assert size.parameters_total == sum(parameter.numel() for parameter in model.parameters())
    assert size.parameters_experts == experts
    assert size.parameters_active == size.parameters_total - experts + experts * 2 // 4  # two of four experts


def test_counts_and_flops_by_hand() -> None:
    size = model_size(tiny_config(KINDS["dropless"]), sequence_length=16)
    attention, router, expert, norms = 2 * 32 * 32 + 2 * 32 * 16, 4 * 32, 3 * 24 * 32, 2 * 32 + 2 * 8
    vocabulary = 128 * 32
    assert size.parameters_total == 2 * (attention + router + 4 * expert + norms) + 32 + 2 * vocabulary
    active = 2 * (attention + router + 2 * expert + norms) + 32 + 2 * vocabulary
    assert size.parameters_active == active
    assert size.flops_per_token == 6 * (active - vocabulary) + 6 * 2 * 16 * 32


@pytest.mark.parametrize(
    "precision,zero_stage,per_dense,per_expert",
    [
        ("fp32", 0, 4 + 4 + 8, 4 + 4 + 8),
        ("bf16", 1, 2 + 2 + 12 / 4, 2 + 2 + 12 / 2),
        ("bf16", 2, 2 + 14 / 4, 2 + 14 / 2),
        ("bf16", 3, 16 / 4, 16 / 2),
    ],
)
def test_state_is_sharded_over_the_ranks_that_hold_the_same_weights(precision: str, zero_stage: int, per_dense: float, per_expert: float) -> None:
    """Four ranks, ep_size 2: dense weights lie on four, each expert on two. Bytes per weight: value, gradient, AdamW with fp32 master."""
    recipe = load_recipe("debug", ["model.vocab_size=512", "parallel.ep_size=2"])
    size = model_size(recipe.model, 64)
    dense = size.parameters_total - size.parameters_experts
    expected = dense * per_dense + size.parameters_experts / 2 * per_expert
    assert state_bytes_per_rank(size, recipe, precision, zero_stage, world_size=4)["total"] == pytest.approx(expected, abs=4)


def test_checkpointing_lowers_the_activation_estimate() -> None:
    plain, saving = (
        load_recipe("debug", ["model.vocab_size=512", "model.num_hidden_layers=8", f"train.activation_checkpointing={flag}"])
        for flag in ("false", "true")
    )
    assert activation_bytes(saving, "fp32") < 0.5 * activation_bytes(plain, "fp32")


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_builds(name: str) -> None:
    recipe = load_recipe(name)
    vocab_size = recipe.model.vocab_size or recipe.data.tokenizer.vocab_size
    config = recipe.model.model_copy(update={"vocab_size": vocab_size})
    assert model_size(config, recipe.train.sequence_length).parameters_active > 0


@pytest.mark.parametrize("path", DS_CONFIGS, ids=lambda path: path.name)
def test_every_shipped_ds_config_resolves(path: Path) -> None:
    resolved = resolve_ds_config(read_ds_config(str(path)), str(path), load_recipe("debug"), "fp32", 4, 1)
    assert resolved["train_batch_size"] == 8
    assert '"auto"' not in json.dumps(resolved)


def test_shipped_files_are_found_at_all() -> None:
    assert {"debug", "quickstart"} <= set(recipe_names())
    assert "zero1.json" in {path.name for path in DS_CONFIGS}
