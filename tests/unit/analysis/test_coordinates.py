"""The coordinate check sees that muP keeps activations as they are where the standard kind lets
them grow.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pretrain.analysis.coordinates import (
    KINDS,
    OUTPUTS,
    activations,
    batches_of,
    measure,
    random_batches,
    recipe_at,
    slope,
    summary,
    verdict_on,
)
from pretrain.config.load import load_recipe
from pretrain.config.recipe import Recipe
from pretrain.model.decoder import DecoderLM
from pretrain.model.init import initialize

WIDTHS, STEPS = (32, 64, 128), 6
SETTINGS = [
    "model.vocab_size=256",
    "train.sequence_length=32",
    "train.global_batch_size=4",
    "train.micro_batch_size=4",
    "model.initializer_range=0.1",
]


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("debug", SETTINGS)


@pytest.fixture(scope="module")
def measured(recipe: Recipe) -> dict[str, dict[str, Any]]:
    recipe, _, batches = batches_of(recipe, "random")
    return {
        kind: summary(
            [
                measure(recipe_at(recipe, width, 32, kind, "head_dim"), kind, batches, STEPS)
                for width in WIDTHS
            ]
        )
        for kind in KINDS
    }


def test_mup_keeps_the_size_of_every_kind_of_layer(measured: dict[str, dict[str, Any]]) -> None:
    layers = measured["mup"]["layers"]
    assert set(layers) == {
        "embedding", "attention scores", "attention", "router logits", "experts", "feed-forward",
        "residual stream", "logits",
    }  # fmt: skip
    hidden = {name: layer["verdict"] for name, layer in layers.items() if name not in OUTPUTS}
    assert hidden == dict.fromkeys(hidden, "stable")
    assert {layers[name]["verdict"] for name in OUTPUTS} <= {"stable", "smaller start"}
    assert (
        layers["logits"]["slopes"][0] == pytest.approx(-0.5, abs=0.1)
        and layers["logits"]["slopes"][-1] > layers["logits"]["slopes"][0] + 0.1
    )


def test_the_standard_kind_grows_in_the_same_steps(measured: dict[str, dict[str, Any]]) -> None:
    layers = measured["standard"]["layers"]
    assert {name for name, layer in layers.items() if layer["verdict"] == "grows"} >= {
        "attention",
        "experts",
        "feed-forward",
        "logits",
    }
    assert (
        layers["feed-forward"]["slopes"][-1]
        > 1.0
        > 0.25
        > abs(measured["mup"]["layers"]["feed-forward"]["slopes"][-1])
    )


def test_both_kinds_are_one_model_at_the_base(measured: dict[str, dict[str, Any]]) -> None:
    standard, mup = (measured[kind]["layers"] for kind in KINDS)
    for name in mup:
        assert [sizes[0] for sizes in mup[name]["sizes"]] == [
            sizes[0] for sizes in standard[name]["sizes"]
        ]
        assert mup[name]["sizes"][-1][-1] != standard[name]["sizes"][-1][-1]


def test_measuring_changes_neither_the_model_nor_its_logits(recipe: Recipe) -> None:
    model, batch = DecoderLM(recipe.model), random_batches(recipe, 0)[0]
    initialize(model, 1)
    before = model.eval().logits(batch.input_ids_BS)
    found = activations(model, batch)
    assert torch.equal(model.logits(batch.input_ids_BS), before) and torch.equal(
        found["logits"][0], before
    )
    assert not [module for module in model.modules() if module._forward_hooks]
    scores = found["attention scores"][0]
    assert scores.shape == (4, 4, 32, 32) and not scores.triu(1).any()


def test_random_tokens_are_the_same_each_time_and_frequent_ones_come_first(recipe: Recipe) -> None:
    first, again, later = (
        torch.cat([batch.labels_BS for batch in random_batches(recipe, step)]) for step in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, later)
    assert (first < 16).float().mean() > 0.4


@pytest.mark.parametrize(
    "layer,power,verdict",
    [
        ("experts", 0.2, "stable"),
        ("experts", -0.3, "shrinks"),
        ("logits", -0.5, "smaller start"),
        ("logits", -0.9, "shrinks"),
        ("logits", 0.3, "grows"),
    ],
)
def test_the_verdict_on_a_power(layer: str, power: float, verdict: str) -> None:
    assert verdict_on(layer, power) == verdict


def test_a_slope_is_the_power_of_the_width() -> None:
    assert slope([8, 16, 64], [2.0, 4.0, 16.0]) == pytest.approx(1.0)
    assert slope([8, 16, 64], [3.0, 3.0, 3.0]) == pytest.approx(0.0)
    assert slope([4, 16], [1.0, 0.5]) == pytest.approx(-0.5)
