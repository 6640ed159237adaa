"""The axes that are shipped beside a recipe: each value is a valid recipe, and does what its name says."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from pretrain.config.load import RECIPE_FOLDER, load_recipe
from pretrain.config.moe_schema import PEER
from pretrain.config.schema import Recipe
from pretrain.model.sizes import model_size

FILES = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((RECIPE_FOLDER / "axes").glob("*.yaml"))}
VALUES = [(name, axis, value) for name, content in FILES.items() for axis, values in content["axes"].items() for value in values]


def recipe_of(name: str, axis: str, value: Any) -> Recipe:
    overrides = [f"{field}={json.dumps(setting)}" for field, setting in FILES[name]["axes"][axis][value].items()]
    return load_recipe(FILES[name]["base"], overrides)


@pytest.mark.parametrize("name,axis,value", VALUES)
def test_every_value_of_an_axis_is_a_recipe_of_countable_size(name: str, axis: str, value: Any) -> None:
    recipe = recipe_of(name, axis, value)
    assert model_size(recipe.model, recipe.train.sequence_length).parameters_active > 0


def peers(axis: str) -> dict[Any, PEER]:
    found = {value: recipe_of("peer_mla", axis, value).model.moe for value in FILES["peer_mla"]["axes"][axis]}
    return {value: moe for value, moe in found.items() if isinstance(moe, PEER)}


def test_peers_axes_vary_what_they_say_and_nothing_else() -> None:
    assert [moe.total_experts for moe in peers("num_experts").values()] == [1 << power for power in (12, 14, 16, 18, 20)]
    assert {moe.total_experts * moe.moe_intermediate_size for moe in peers("expert_size").values()} == {1 << 20}
    assert {value: len(moe.product_key_sizes) for value, moe in peers("product").items()} == {"2d": 2, "3d": 3, "4d": 4}
    assert {moe.total_experts for moe in peers("product").values()} == {1 << 20}
    assert {moe.experts_per_token for moe in peers("heads_by_top_k").values()} == {128} and len(peers("heads_by_top_k")) == 4
