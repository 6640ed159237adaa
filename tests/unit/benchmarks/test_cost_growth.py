"""The arithmetic of the benchmark of growth: slopes, floors and what the table says of them."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest

from pretrain.core.errors import ConfigError
from tests.support.paths import ROOT


@pytest.fixture
def growth(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("cost_growth")


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0])
def test_a_slope_is_the_exponent_of_a_power_law(growth: ModuleType, exponent: float) -> None:
    values = [2.0, 4.0, 16.0, 64.0]
    assert growth.slope(values, [3.0 * v**exponent for v in values]) == pytest.approx(exponent)


def test_a_slope_needs_two_values(growth: ModuleType) -> None:
    with pytest.raises(ValueError, match="two different"):
        growth.slope([4.0, 4.0], [1.0, 2.0])


def test_parameter_traffic_is_the_formula(growth: ModuleType) -> None:
    # 4 * 2 * m + 2 bytes on each rank, 24 on one: by hand for 10 dense and 100 expert parameters.
    assert growth.parameter_traffic(10, 100, ranks=1, micro_batches=2) == 110 * (18 + 24)
    assert growth.parameter_traffic(10, 100, ranks=4, micro_batches=1) == (
        10 * (4 * 10 + 24) + 100 * (10 + 24)
    )


def test_experts_grow_the_traffic_and_not_the_flops(growth: ModuleType) -> None:
    from pretrain.model.sizes import model_size

    recipes = [growth.recipe_of(*growth.overrides("experts", value)) for value in (8, 256)]
    few, many = (model_size(recipe.model, 256).flops_per_token for recipe in recipes)
    # The router alone has more rows.
    assert few < many < 1.05 * few
    assert growth.traffic_of(recipes[1]) > 10 * growth.traffic_of(recipes[0])


def test_every_point_is_a_valid_recipe_of_its_size(growth: ModuleType) -> None:
    for axis, found in growth.AXES.items():
        for value in found.values:
            train = growth.recipe_of(*growth.overrides(axis, value)).train
            if axis == "tokens":
                assert train.tokens_per_step == value
            if axis == "sequence":
                assert train.tokens_per_step == growth.STEP_TOKENS
    with pytest.raises(ConfigError, match="there is no axis"):
        growth.overrides("depth", 2)


def points(growth: ModuleType, exponent: float) -> list[object]:
    return [growth.Point(v, 5.0 * v**exponent, 0.5 * v, 0.5 * v, 10**9) for v in (8, 16, 32)]


@pytest.mark.parametrize(("exponent", "faster"), [(0.5, False), (1.0, False), (1.3, True)])
def test_faster_growth_than_the_floor_has_its_reason(
    growth: ModuleType, exponent: float, faster: bool
) -> None:
    found = growth.growth_of(points(growth, exponent), "because")
    assert found.is_faster is faster
    assert (": because" in growth.growth_text(found)) is faster
    assert found.floor == pytest.approx(1.0)


def test_a_row_shows_cost_floor_and_ratio(growth: ModuleType) -> None:
    table = growth.table_of({"experts": points(growth, 1.0)})
    assert [next(iter(column.cells)) for column in table.columns][:5] == [
        "experts",
        "8",
        "40000",
        "8000",
        "5.00",
    ]
