"""The axes that are shipped: each value is a valid recipe, and does what its name says."""

from __future__ import annotations

import pytest

from pretrain.config.load import load_recipe
from pretrain.config.recipe import Recipe
from pretrain.model.config import ModelConfig
from pretrain.model.moe.config import PEERConfig, RoutedMoE
from pretrain.model.sizes import ModelSize, model_size
from pretrain.sweeps.axes import AXES_FOLDER, Choice, parse_axis, read_axes_file

FILES = {path.stem: read_axes_file(path.stem) for path in sorted(AXES_FOLDER.glob("*.yaml"))}
CHOICES = {
    (name, axis.name, choice.label): choice
    for name, (_, axes) in FILES.items()
    for axis in (parse_axis(*item) for item in axes.items())
    for choice in axis.options
}


def recipe_of(name: str, choice: Choice) -> Recipe:
    return load_recipe(str(FILES[name][0]), list(choice.overrides))


def size_of(recipe: Recipe) -> ModelSize:
    vocab_size = recipe.model.vocab_size or recipe.data.tokenizer.vocab_size
    model: ModelConfig = recipe.model.model_copy(update={"vocab_size": vocab_size})
    return model_size(model, recipe.train.sequence_length)


@pytest.mark.parametrize("name,axis,label", CHOICES)
def test_every_value_of_an_axis_is_a_recipe_of_countable_size(
    name: str, axis: str, label: str
) -> None:
    assert size_of(recipe_of(name, CHOICES[name, axis, label])).parameters_active > 0


def along(name: str, axis: str) -> dict[str, Recipe]:
    return {
        label: recipe_of(name, choice)
        for (file, own, label), choice in CHOICES.items()
        if (file, own) == (name, axis)
    }


def peers(axis: str) -> dict[str, PEERConfig]:
    return {
        label: recipe.model.moe
        for label, recipe in along("peer_mla", axis).items()
        if isinstance(recipe.model.moe, PEERConfig)
    }


def test_peers_axes_vary_what_they_say_and_nothing_else() -> None:
    assert [moe.total_experts for moe in peers("num_experts").values()] == [
        1 << power for power in (12, 14, 16, 18, 20)
    ]
    assert {
        moe.total_experts * moe.moe_intermediate_size for moe in peers("expert_size").values()
    } == {1 << 20}
    assert {label: len(moe.product_key_sizes) for label, moe in peers("product").items()} == {
        "2d": 2,
        "3d": 3,
        "4d": 4,
    }
    assert {moe.total_experts for moe in peers("product").values()} == {1 << 20}
    assert {moe.experts_per_token for moe in peers("heads_by_top_k").values()} == {128} and len(
        peers("heads_by_top_k")
    ) == 4


def test_more_experts_and_finer_ones_leave_the_work_of_a_token_and_more_of_them_a_token_leave_the_parameters() -> (
    None
):
    sizes = {
        axis: [size_of(recipe) for recipe in along("moe", axis).values()]
        for axis in ("num_experts", "granularity", "top_k")
    }
    routers = 32 * 256 * 4  # an expert more is a row more in each of four routers
    for axis in ("num_experts", "granularity"):
        active = [size.parameters_active for size in sizes[axis]]
        assert max(active) - min(active) <= routers, axis
    assert [size.parameters_experts for size in sizes["num_experts"]] == [
        12582912 // 8 * count for count in (4, 8, 16, 32)
    ]
    assert len({size.parameters_experts for size in sizes["granularity"]}) == 1
    assert len({size.parameters_total for size in sizes["top_k"]}) == 1
    active = [size.parameters_active for size in sizes["top_k"]]
    assert active == sorted(set(active))


def test_balancing_is_by_loss_by_bias_or_not_at_all() -> None:
    found = {
        label: recipe.model.moe
        for label, recipe in along("moe", "balancing").items()
        if isinstance(recipe.model.moe, RoutedMoE)
    }
    assert {
        label: (moe.aux_loss_weight, moe.bias_balancing is not None) for label, moe in found.items()
    } == {
        "aux_0.01": (0.01, False),
        "aux_0.001": (0.001, False),
        "bias": (0.0, True),
        "none": (0.0, False),
    }
