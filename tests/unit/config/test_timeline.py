"""Steps, tokens and blocks of a run with phases, and recipes whose phases cannot be."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config.load import load_recipe, parse_yaml, recipe_to_yaml, validate_recipe
from pretrain.config.recipe import Recipe
from pretrain.config.rules.phases import PHASE_RULES
from pretrain.config.timeline import Timeline, recipe_at
from pretrain.core.errors import ConfigError

# Rule -> (overrides that break it, parts of the sentence, overrides that fix it); debug has 10,240
# tokens in sequences of 64.
TWO = "phases=[{name: a, tokens: 2048}, {name: b}]"
LLAMA3 = "model.position={kind: llama3, factor: 2, original_max_position_embeddings: 64}"
BROKEN = {
    "phases_have_names_of_their_own": (
        ["phases=[{name: a, tokens: 2048}, {name: a}]"],
        ["two are called 'a'"],
        ["phases.1.name=b"],
    ),
    "phases_fit_megatrons_order": (
        ["data.order=megatron", TWO, "phases.1.sequence_length=32"],
        ["phases.b.sequence_length", "data.order=megatron"],
        ["data.order=shuffled"],
    ),
    "phases_fill_the_run": (
        [TWO, "phases.1.tokens=1"],
        ["take 2049 tokens", "train_tokens is 10240"],
        ["phases.1.tokens=8192"],
    ),
    "phases_fill_the_run/rest": (
        ["phases=[{name: a, tokens: 10240}, {name: b}]"],
        ["phases before 'b' take 10240"],
        ["train.train_tokens=20480"],
    ),
    "phases_fill_the_run/missing": (
        ["phases=[{name: a}, {name: b}]"],
        ["phases.a.tokens is missing"],
        ["phases.0.tokens=2048"],
    ),
    "phase_lengths_divide": (
        [TWO, "phases.1.sequence_length=96"],
        ["phases.a.sequence_length (64)", "longest of the run (96)"],
        ["phases.1.sequence_length=128"],
    ),
    "phases_can_run": (
        [TWO, "phases.1.sequence_length=512"],
        ["phases.b: ", "max_position_embeddings (256)"],
        ["phases.1.sequence_length=256"],
    ),
    "phases_can_run/micro": (
        [TWO, "phases.1.global_batch_size=5"],
        ["phases.b: ", "global_batch_size (5)"],
        ["phases.1.global_batch_size=6"],
    ),
    "phase_positions_need_no_training": (
        [TWO, "phases.1.position={rope_theta: 500}", "model.position={kind: alibi}"],
        ["phases.b.position has kind=rope in a model of kind=alibi"],
        ["model.position={kind: rope}"],
    ),
    "phase_positions_need_no_training/alibi": (
        [TWO, "phases.1.position={kind: rope_alibi}"],
        ["only the base of a rotary embedding"],
        ["phases.1.position={kind: rope}"],
    ),
    "phase_positions_need_no_training/yarn": (
        [
            TWO,
            "phases.1.position={kind: rope}",
            "model.position={kind: yarn, factor: 2, original_max_position_embeddings: 64}",
        ],
        ["takes yarn away"],
        ["phases.1.position={kind: yarn, factor: 4, original_max_position_embeddings: 64}"],
    ),
    "phase_positions_need_no_training/llama3": (
        [
            TWO,
            "phases.1.position={kind: yarn, factor: 2, original_max_position_embeddings: 64}",
            LLAMA3,
        ],
        ["takes llama3 away"],
        ["phases.1.position={kind: llama3, factor: 4, original_max_position_embeddings: 64}"],
    ),
    "phase_mixtures_are_shares": (
        [TWO, "phases.1.mixture={kind: tokens, tokens: {all: 1}}"],
        ["phases.b.mixture.kind=tokens"],
        ["phases.1.mixture={kind: proportional}"],
    ),
    "phase_mixtures_are_shares/base": (
        [
            TWO,
            "phases.1.mixture={kind: proportional}",
            "data.mixture={kind: tokens, tokens: {all: 10240}}",
        ],
        ["data.mixture.kind=tokens is for whole runs"],
        ["data.mixture={kind: proportional}"],
    ),
    "phases_fit_a_stream": (
        [TWO, "data.streaming=true", "phases.1.global_batch_size=16"],
        ["phases.b.global_batch_size", "data.streaming"],
        ["phases.1.global_batch_size=null"],
    ),
    "weights_come_from_one_place": (
        ["branch_from=x", "initial_weights=y"],
        ["branch_from", "initial_weights"],
        ["initial_weights=null"],
    ),
    "the schema": (
        [TWO, "phases.1.schedule={kind: constant, end_ratio: 0.5}"],
        ["'phases.1.schedule': kind=constant keeps start_ratio"],
        ["phases.1.schedule.kind=linear"],
    ),
    "the schema/field": (
        [TWO, "phases.1.sequnce_length=32"],
        ["unknown field 'phases.1.sequnce_length'", "did you mean 'sequence_length'"],
        ["phases.1={name: b}"],
    ),
    "the schema/entry": (
        [TWO, "phases.2.name=c"],
        ["instead of '2' give the index of an entry", "from 0 to 1"],
        None,
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_phases_that_cannot_be_are_refused_and_the_advice_helps(name: str) -> None:
    overrides, parts, remedy = BROKEN[name]
    with pytest.raises(ConfigError) as caught:
        load_recipe("debug", overrides)
    for part in parts:
        assert part in str(caught.value)
    if remedy is not None:
        load_recipe("debug", [*overrides, *remedy])


def test_every_rule_about_phases_has_a_case() -> None:
    rules = {rule.__name__ for rule in PHASE_RULES} | {"phases_can_run"}
    assert {name.partition("/")[0] for name in BROKEN} - {"the schema"} == rules


def with_phases(phases: list[dict[str, object]], train_tokens: int) -> Recipe:
    content = load_recipe("debug").model_dump(mode="json")
    content |= {"schedule": {"kind": "constant"}}
    return validate_recipe(
        content | {"phases": phases, "train": content["train"] | {"train_tokens": train_tokens}},
        "a test",
    )


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    phases: list[dict[str, object]] = [
        {
            "name": f"p{number}",
            "tokens": draw(st.integers(1, 20_000)),
            "sequence_length": draw(st.sampled_from([16, 32, 64, 128])),
            "global_batch_size": draw(st.sampled_from([2, 6, 8])),
        }
        for number in range(draw(st.integers(1, 4)))
    ]
    return with_phases(phases, sum(int(str(phase["tokens"])) for phase in phases))


@given(recipes())
@settings(max_examples=60, deadline=None)
def test_stages_follow_each_other_and_hold_what_their_phase_asks_for(recipe: Recipe) -> None:
    timeline = Timeline(recipe)
    step = tokens = block = 0
    for stage, phase in zip(timeline.phases, recipe.phases, strict=True):
        train = stage.recipe.train
        assert (stage.first_step, stage.first_tokens, stage.first_block) == (step, tokens, block)
        assert (train.sequence_length, train.global_batch_size) == (
            phase.sequence_length,
            phase.global_batch_size,
        )
        # As few whole groups of blocks as hold its tokens.
        group = train.global_batch_size * timeline.block_tokens
        assert (
            stage.num_tokens % group == 0
            and stage.num_tokens - group < (phase.tokens or 0) <= stage.num_tokens
        )
        assert timeline.at(step) is stage and timeline.at(stage.end_step - 1) is stage
        step, tokens = stage.end_step, tokens + stage.num_tokens
        block += stage.num_tokens // timeline.block_tokens
    assert (timeline.num_steps, timeline.num_tokens) == (step, tokens)
    after = [timeline.tokens_after(step) for step in range(timeline.num_steps + 1)]
    assert after[0] == 0 and after[-1] == tokens
    assert [later - earlier for earlier, later in pairwise(after)] == [
        timeline.at(step).recipe.train.tokens_per_step for step in range(timeline.num_steps)
    ]
    assert [step for step in range(timeline.num_steps + 1) if timeline.ends_phase(step)] == [
        stage.end_step for stage in timeline.phases[:-1]
    ]


@given(st.integers(1, 100_000))
@settings(max_examples=20, deadline=None)
def test_a_run_without_phases_and_one_phase_of_everything_are_the_same_steps(
    train_tokens: int,
) -> None:
    plain, one = (
        Timeline(with_phases([], train_tokens)),
        Timeline(with_phases([{"name": "all"}], train_tokens)),
    )
    assert plain.num_steps == one.num_steps == -(-train_tokens // 512)
    assert [timeline.tokens_after(timeline.num_steps) for timeline in (plain, one)] == [
        plain.num_tokens
    ] * 2
    assert (
        plain.phases[0].recipe.phases == []
        and plain.phases[0].name == ""
        and plain.block_tokens == 64
    )


def test_a_checkpoint_belongs_to_the_phase_of_its_last_step() -> None:
    phases = (
        "phases=[{name: a, tokens: 1024}, {name: b, position: {rope_theta: 77}, sequence_length:"
        " 32, mixture: {kind: temperature, temperature: 2}}]"
    )
    recipe = load_recipe("debug", [phases])
    assert recipe == load_recipe_again(recipe)
    thetas = [recipe_at(recipe, step).model.position.rope_theta for step in (0, 1, 2, 3, 40, 99)]
    assert thetas == [10000, 10000, 10000, 77, 77, 77]
    late = recipe_at(recipe, 3)
    assert (
        late.phases == []
        and late.train.sequence_length == 32
        and late.data.mixture.kind == "temperature"
    )
    assert Timeline(recipe).changes_length(2) and not any(
        Timeline(recipe).changes_length(step) for step in (0, 1, 3)
    )


def load_recipe_again(recipe: Recipe) -> Recipe:
    return validate_recipe(parse_yaml(recipe_to_yaml(recipe), "the dump"), "the dump")
