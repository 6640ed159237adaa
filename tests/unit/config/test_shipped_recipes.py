"""Every shipped recipe loads; a published model has a small copy that keeps each of its parts."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from data_pipeline.config import Weights
from data_pipeline.tokenizer.config import TrainSentencePiece
from pretrain.config.load import load_recipe, recipe_to_yaml
from pretrain.config.recipe import Recipe
from pretrain.config.rules.sections import check_topology
from pretrain.config.timeline import Timeline
from pretrain.core.shipped import RECIPES, recipe_names

NAMES = recipe_names()
SMALL_RECIPES = [name for name in NAMES if name.endswith("_mini")]
TWIN_OF: dict[str, str] = {
    yaml.safe_load((RECIPES / f"{name}.yaml").read_text())["base"]: name for name in SMALL_RECIPES
}
PUBLISHED = list(TWIN_OF)
# Another schedule of a published model: its small copy is that of the model.
SCHEDULES = {"khanh_692m_cosine"}
PHASED = {"quickstart_wsd", "quickstart_wsd_decay", "quickstart_long", "long_context"}
PHASED |= {f"h64lm_phase{number}" for number in (1, 2, 3, 4)}
# What a small copy may have smaller than its model; everything else of the model section is
# the same.
SIZES = {
    "vocab_size", "embedding_size", "hidden_size", "num_hidden_layers", "intermediate_size",
    "max_position_embeddings", "initializer_range",
    "attention.num_attention_heads", "attention.num_key_value_heads", "attention.head_dim",
    "attention.sliding_window",
    "attention.q_lora_rank", "attention.kv_lora_rank", "attention.qk_rope_head_dim",
    "attention.qk_nope_head_dim", "attention.v_head_dim",
    "position.factor", "position.original_max_position_embeddings", "moe.num_experts", "moe.top_k",
    "moe.moe_intermediate_size",
    "moe.product_key_sizes", "moe.num_heads", "moe.query_dim",
}  # fmt: skip


def flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every value of nested mappings by its dotted path."""
    found: dict[str, Any] = {}
    for key, value in section.items():
        found |= (
            flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        )
    return found


def differences(small: Recipe, real: Recipe) -> list[str]:
    """The fields in which two models are of another form, not only of another size."""
    mine, others = (flat(recipe.model.model_dump(mode="json")) for recipe in (small, real))
    found = [
        name
        for name in mine.keys() | others.keys()
        if name not in SIZES and mine.get(name) != others.get(name)
    ]
    # A size that is given in one is given in the other; the copy's vocabulary comes from its
    # tokenizer.
    return found + [
        name
        for name in SIZES - {"vocab_size"}
        if (mine.get(name) is None) != (others.get(name) is None)
    ]


def test_published_models_and_their_twins_are_there() -> None:
    others = {"debug", "quickstart", "moe_1b", "peer_mla_mixes"}
    assert others | PHASED | SCHEDULES | set(PUBLISHED) | set(SMALL_RECIPES) == set(NAMES)
    assert set(PUBLISHED) == {
        "h64lm", "h64lm_tied", "khanh_692m", "fastgpt_moe", "p828_60m", "p828_800m",
        "p828_800m_as_written", "mixtral_8x7b", "olmoe_1b_7b",
        "qwen3_30b_a3b", "gpt_oss_20b", "deepseek_moe_16b", "deepseek_v3", "peer_mla_16b",
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_called_as_its_file_and_stands_by_itself(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert "base" not in yaml.safe_load(recipe_to_yaml(recipe))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_needs_no_tokenizer_to_be_counted_and_starts_on_its_ranks(
    name: str,
) -> None:
    recipe = load_recipe(name)
    assert recipe.model.vocab_size is not None
    assert recipe.data.tokenizer.vocab_size in (None, recipe.model.vocab_size)
    assert check_topology(recipe, recipe.parallel.ep_size, zero_stage=1) >= 1


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_twin_has_every_part_of_its_model(name: str) -> None:
    small, real = load_recipe(TWIN_OF[name]), load_recipe(name)
    assert differences(small, real) == []
    attention, original = small.model.attention, real.model.attention
    assert (attention.score_dim * 2 == attention.cached_per_token) == (
        original.score_dim * 2 == original.cached_per_token
    )  # shared heads or none
    assert bool(small.model.moe_layers) and (
        len(small.model.moe_layers) < small.model.num_hidden_layers
    ) == (len(real.model.moe_layers) < real.model.num_hidden_layers)


@pytest.mark.parametrize(
    "name,override,field",
    [
        ("gpt_oss_20b", "model.attention.sinks=false", "attention.sinks"),
        (
            "gpt_oss_20b",
            "model.attention.full_attention_every=null",
            "attention.full_attention_every",
        ),
        ("h64lm", "model.position={kind: rope}", "position.kind"),
        ("h64lm", "model.moe.router.temperature=1", "moe.router.temperature"),
        ("h64lm_tied", "model.tie_word_embeddings=false", "tie_word_embeddings"),
        ("khanh_692m", "model.norm_position=pre", "norm_position"),
        ("fastgpt_moe", "model.embedding_size=null", "embedding_size"),
        ("deepseek_v3", "model.attention.q_lora_rank=null", "attention.q_lora_rank"),
        ("deepseek_v3", "model.layer_pattern.k=1", "layer_pattern.k"),
        ("peer_mla_16b", "model.moe.query_norm=rms_norm", "moe.query_norm"),
        ("peer_mla_16b", "model.attention.latent_norm=rms_norm", "attention.latent_norm"),
        ("p828_60m", "model.moe.bias_balancing=null", "moe.bias_balancing"),
        ("p828_60m", "model.moe.router.groups=null", "moe.router.groups"),
    ],
)
def test_a_twin_without_a_part_is_noticed(name: str, override: str, field: str) -> None:
    found = differences(load_recipe(TWIN_OF[name], [override]), load_recipe(name))
    assert any(path == field or path.startswith(f"{field}.") for path in found)


@pytest.mark.parametrize("name", SMALL_RECIPES)
def test_a_twin_trains_for_a_minute_on_the_quickstart_data(name: str) -> None:
    recipe, quickstart = load_recipe(name), load_recipe("quickstart")
    same = quickstart.data.model_copy(update={"path": quickstart.data_path})
    if isinstance(recipe.data.tokenizer, TrainSentencePiece):
        # Other tokens need another folder; all else is the quickstart's.
        own = {"path": f"{quickstart.data_path}_sentencepiece", "tokenizer": recipe.data.tokenizer}
        same = same.model_copy(update=own)
    assert recipe.data == same
    assert (
        60 <= Timeline(recipe).num_steps <= 100
        and recipe.schedule.warmup_steps < Timeline(recipe).num_steps / 4
    )
    assert recipe.parallel.ep_size == 2 and check_topology(recipe, 2, zero_stage=1) == 1
    window = recipe.model.attention.sliding_window
    assert window is None or window < recipe.train.sequence_length  # so that it hides something


def test_the_phases_of_h64lm_have_its_rows_epochs_and_regularisation() -> None:
    phases = [load_recipe(f"h64lm_phase{number}") for number in (1, 2, 3, 4)]
    rows = [100_000, 1_000_000, -1, 100_000]
    assert [phase.data.model_dump()["source"].get("max_samples", -1) for phase in phases] == rows
    assert [phase.train.epochs for phase in phases] == [20, 10, 5, 20]
    for phase in phases:
        assert phase.train.train_tokens is None and phase.schedule.warmup_of(1000) == 100
        assert phase.guards.early_stopping is not None and phase.guards.early_stopping.patience == 3
        assert phase.checkpoint.keep_epochs and phase.validation.interval_steps == 0
        assert phase.train.activation_checkpointing
        rate = phase.optimizer.learning_rate * phase.guards.rollback.learning_rate_factor
        assert rate == pytest.approx(1e-4)
    assert phases[0].model == load_recipe("h64lm").model == phases[2].model
    last = phases[3].model
    assert (
        last.num_hidden_layers == 4 and last.dropout.attention == last.dropout.feed_forward == 0.2
    )
    assert last.moe is not None and last.moe.aux_loss_weight == 0.02
    assert phases[3].data_path == phases[0].data_path
    for before, after in ((0, 1), (1, 2)):
        assert phases[after].initial_weights == f"{phases[before].output_path}/checkpoints/best"


def test_h64lm_has_the_steps_that_its_code_makes() -> None:
    recipe = load_recipe("h64lm")
    assert Timeline(recipe).num_steps == 7975 == int(20 * 51_044 / recipe.train.global_batch_size)


def test_khanhllm_is_trained_as_published_and_its_later_schedule_differs_in_three_values() -> None:
    recipe, later = load_recipe("khanh_692m"), load_recipe("khanh_692m_cosine")
    train, optimizer = recipe.train, recipe.optimizer
    assert (train.micro_batch_size, train.global_batch_size, train.sequence_length) == (1, 64, 2048)
    assert (train.precision, train.tf32, train.compile) == ("fp32", True, "blocks")
    assert train.activation_checkpointing and recipe.data.streaming
    assert (optimizer.kind, optimizer.learning_rate) == ("adamw_8bit", 5e-5)
    assert (optimizer.beta1, optimizer.beta2) == (0.9, 0.95)
    assert (recipe.schedule.kind, recipe.schedule.warmup_steps, train.grad_clip) == (
        "constant",
        0,
        0.0,
    )
    steps = Timeline(later).num_steps
    assert later.schedule.warmup_steps == max(1000, round(0.03 * steps))
    assert later.schedule.kind == "cosine" and later.train.grad_clip == 1.0
    lowest = later.optimizer.learning_rate * later.schedule.min_learning_rate_ratio
    assert lowest == pytest.approx(5e-6)
    changed = {"name", "train", "schedule"}
    assert {
        name
        for name in Recipe.model_fields
        if getattr(recipe, name) != getattr(later, name)
    } == changed  # fmt: skip


@pytest.mark.parametrize("name", ["p828_60m", "p828_800m", "p828_800m_as_written"])
def test_project_828_is_trained_as_published_and_watched_for_its_red_flags(name: str) -> None:
    recipe = load_recipe(name)
    train, schedule, guards = recipe.train, recipe.schedule, recipe.guards
    assert (train.micro_batch_size, train.global_batch_size, train.sequence_length) == (
        8,
        128,
        2048,
    )
    assert check_topology(load_recipe(name, ["parallel.ep_size=1"]), 1, zero_stage=1) == 16
    assert (Timeline(recipe).num_steps, schedule.warmup_steps) == (100_000, 2000)
    assert (schedule.kind, train.grad_clip, recipe.checkpoint.interval_steps) == (
        "cosine",
        1.0,
        50_000,
    )
    assert guards.loss_trend is not None and guards.loss_trend.window_steps == 5000
    assert guards.sustained_grad_norm is not None and guards.sustained_grad_norm.max == 10.0
    assert guards.validation_gap is not None and guards.non_finite.action == "skip"


def test_peer_and_mla_train_on_the_published_mixture_and_are_evaluated_as_published() -> None:
    recipe = load_recipe("peer_mla_16b")
    assert recipe.data.streaming and isinstance(recipe.data.mixture, Weights)
    assert recipe.data.mixture.weights == {"pile": 0.7, "c4": 0.2, "code_alpaca": 0.1}
    assert recipe.data.named_sources.keys() == recipe.data.mixture.weights.keys()
    evaluation = recipe.evaluation
    assert evaluation is not None and evaluation.interval_steps == 2000
    assert evaluation.tasks == ["hellaswag", "mmlu", "truthfulqa", "gsm8k", "humaneval"]
    # Counts of experts every 1,000 steps; hot is more than 5 times the mean.
    assert recipe.logging.usage_interval_steps == 1000
    assert recipe.logging.hot_expert_factor == 5.0
