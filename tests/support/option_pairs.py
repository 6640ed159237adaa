"""Combinations of a model's kinds and options with ways to train it: rows in which every pair that
the rules allow stands at least once.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable
from functools import cache
from typing import Any

from pretrain.config.load import apply_override, load_recipe, read_recipe_file, validate_recipe
from pretrain.config.rules.sections import check_topology
from pretrain.core.errors import ConfigError
from tests.support.covering_rows import (
    Choice,
    Row,
    covering_rows,
    ordered,
    spanning_rows,
)
from tests.support.model_kinds import FAMILIES, KINDS, OPTIONS

WORLD_SIZE = 2
SIZES = (
    "model.vocab_size=128", "train.sequence_length=32", "train.global_batch_size=4",
    "train.micro_batch_size=1", "model.initializer_range=0.1",
    "optimizer.learning_rate=0.01", "logging.tensorboard=false",
)  # fmt: skip
DEBUG = "debug's"  # the value of the recipe that all rows are laid over
DROPOUT = (
    "model.dropout={embedding: 0.1, attention: 0.1, residual: 0.1, feed_forward: 0.1, expert: 0.1}"
)
# What the contract of kinds leaves out. In evaluation a full expert has room for all tokens here,
# so that nothing depends on what comes later.
MORE_OPTIONS = {
    "full experts turn tokens away": [
        "model.moe.kind=deepspeed", "model.moe.gate=router", "model.moe.capacity_factor=1"
    ],
    "DeepSpeed's jitter and residual experts": [
        "model.moe.kind=deepspeed", "model.moe.drop_tokens=false",
        "model.moe.noisy_gate_policy=Jitter", "model.moe.use_residual=true",
    ],
    "router jitter": ["model.moe.router.jitter=0.1"],
    "output z-loss, chunks": ["model.output_z_loss_weight=0.001", "model.loss_chunk_tokens=7"],
}  # fmt: skip
# Optimizers but the recipe's own; Lion moves every weight by its rate.
RATES = {"adamw_8bit": 0.01, "muon": 0.02, "lion": 0.004, "sgd": 2.0}
# A parameter's values, each with its overrides of the recipe.
Values = dict[str, list[str]]
SETTINGS: dict[str, Values] = {
    "dropout": {"off": [], "on": [DROPOUT]},
    "tied": {"off": [], "on": ["model.tie_word_embeddings=true"]},
    "recomputed": {"off": [], "on": ["train.activation_checkpointing=true"]},
    "document mask": {"off": [], "on": ["data.document_mask=true"]},
    "balance scope": {"micro_batch": [], "global_batch": ["model.moe.balance_scope=global_batch"]},
    "kernel": {"sdpa": [], "reference": ["model.attention.kernel=reference"]},
    "precision": {"fp32": [], "bf16": ["train.precision=bf16"]},
    "optimizer": {
        "adamw": [],
        **{
            kind: [f"optimizer={{kind: {kind}, learning_rate: {rate}}}"]
            for kind, rate in RATES.items()
        },
    },
    "ep_size": {"1": [], "2": ["parallel.ep_size=2"]},
    "sp_size": {"1": [], "2": ["parallel.sp_size=2"]},
    "zero": {"1": [], "0": [], "2": [], "3": []},  # in the ds_config, not in the recipe
}


def parameters() -> dict[str, Values]:
    """Every family with all its kinds, every option, and the settings.

    First stands what the recipe has that all rows are laid over.

    An option that names a kind is a value of that kind's family.
    """
    debug, found = load_recipe("debug"), dict[str, Values]()
    for family in FAMILIES:
        kinds = {kind: overrides for (of, kind), overrides in KINDS.items() if of == family}
        own = [
            kind for kind, overrides in kinds.items() if load_recipe("debug", overrides) == debug
        ]
        found[family] = {kind: kinds[kind] for kind in own} or {DEBUG: []}
        found[family] |= kinds
    for option, overrides in (OPTIONS | MORE_OPTIONS).items():
        family = next(
            (
                name
                for name in FAMILIES
                if any(
                    override.startswith((f"model.{name}.kind=", f"model.{name}={{kind:"))
                    for override in overrides
                )
            ),
            None,
        )
        if family is None:
            found[option] = {"off": [], "on": overrides}
        else:
            found[family][option] = overrides
    return found | SETTINGS


PARAMETERS = parameters()
OWN = {name: next(iter(values)) for name, values in PARAMETERS.items()}
VALUES = {name: list(values) for name, values in PARAMETERS.items()}


def chosen_overrides(row: Row) -> list[str]:
    return [override for name, value in row for override in PARAMETERS[name][value]]


def overrides_of(row: Row) -> list[str]:
    """Of the debug recipe."""
    return [*SIZES, *chosen_overrides(row)]


@cache
def _sized_debug() -> dict[str, Any]:
    content, _ = read_recipe_file("debug")
    for override in SIZES:
        apply_override(content, override)
    return content


@cache
def refusal(row: Row) -> str | None:
    """Why the rules refuse a whole or a partial row, with debug's values for what is not in it.

    None where they do not.

    Does what ``load_recipe`` does, without reading the file thousands of times.
    """
    content = copy.deepcopy(_sized_debug())
    try:
        for override in chosen_overrides(row):
            apply_override(content, override)
        recipe = validate_recipe(content, "the row")
        check_topology(recipe, WORLD_SIZE, int(dict(row).get("zero", "1")))
    except ConfigError as error:
        return str(error)
    return None


def about_experts(choice: Choice) -> bool:
    overrides = PARAMETERS[choice[0]][choice[1]]
    return bool(overrides) and all(override.startswith("model.moe") for override in overrides)


@cache
def possible_pairs() -> frozenset[Row]:
    """Every pair of values of two parameters, refused or not, but for what says nothing: how a
    model without experts should use them.
    """
    choices = [[(name, value) for value in values] for name, values in PARAMETERS.items()]
    pairs = (
        pair
        for first, second in itertools.combinations(choices, 2)
        for pair in itertools.product(first, second)
    )
    dense = ("layer_pattern", "all_dense")
    return frozenset(
        pair for pair in pairs if not (dense in pair and any(map(about_experts, pair)))
    )


@cache
def allowed_pairs() -> frozenset[Row]:
    return frozenset(pair for pair in possible_pairs() if refusal(pair) is None)


def in_order(choices: Iterable[Choice]) -> Row:
    return ordered(VALUES, choices)


@cache
def rows() -> tuple[Row, ...]:
    """Rows that hold every allowed pair."""
    return covering_rows(VALUES, allowed_pairs(), refusal)


@cache
def sample() -> tuple[Row, ...]:
    """The fewest rows found that have every value."""
    return spanning_rows(VALUES, rows())


def name_of(row: Row) -> str:
    """What differs from the recipe that it is laid over."""
    named = [
        name if value == "on" else f"{name}={value}" for name, value in row if value != OWN[name]
    ]
    return ", ".join(named).replace(" ", "_") or "debug"
