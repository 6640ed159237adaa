"""The arithmetic of the benchmark of growth: slopes, floors and what the table says of them."""

from __future__ import annotations

import cost_growth
import pytest

from pretrain.core.errors import ConfigError


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0])
def test_a_slope_is_the_exponent_of_a_power_law(exponent: float) -> None:
    values = [2.0, 4.0, 16.0, 64.0]
    assert cost_growth.slope(values, [3.0 * v**exponent for v in values]) == pytest.approx(exponent)


def test_a_slope_needs_two_values() -> None:
    with pytest.raises(ValueError, match="two different"):
        cost_growth.slope([4.0, 4.0], [1.0, 2.0])


def test_parameter_traffic_is_the_formula() -> None:
    # 4 * 2 * m + 2 bytes on each rank, 24 on one: by hand for 10 dense and 100 expert parameters.
    assert cost_growth.parameter_traffic(10, 100, ranks=1, micro_batches=2, width=2) == 110 * (
        18 + 24
    )
    assert cost_growth.parameter_traffic(10, 100, ranks=4, micro_batches=1, width=2) == (
        10 * (4 * 10 + 24) + 100 * (10 + 24)
    )


def test_experts_grow_the_traffic_and_not_the_flops() -> None:
    from pretrain.model.sizes import model_size

    recipes = [
        cost_growth.recipe_of(*cost_growth.overrides("experts", value)) for value in (8, 256)
    ]
    few, many = (model_size(recipe.model, 256).flops_per_token for recipe in recipes)
    # The router alone has more rows.
    assert few < many < 1.05 * few
    assert cost_growth.traffic_of(recipes[1]) > 10 * cost_growth.traffic_of(recipes[0])


def test_every_point_is_a_valid_recipe_of_its_size() -> None:
    for axis, found in cost_growth.AXES.items():
        for value in found.values:
            train = cost_growth.recipe_of(*cost_growth.overrides(axis, value)).train
            if axis == "tokens":
                assert train.tokens_per_step == value
            if axis == "sequence":
                assert train.tokens_per_step == cost_growth.STEP_TOKENS
    with pytest.raises(ConfigError, match="there is no axis"):
        cost_growth.overrides("depth", 2)


def points(exponent: float) -> list[object]:
    return [cost_growth.Point(v, 5.0 * v**exponent, 0.5 * v, 0.5 * v, 10**9) for v in (8, 16, 32)]


@pytest.mark.parametrize(("exponent", "faster"), [(0.5, False), (1.0, False), (1.3, True)])
def test_faster_growth_than_the_floor_has_its_reason(exponent: float, faster: bool) -> None:
    found = cost_growth.growth_of(points(exponent), "because")
    assert found.is_faster is faster
    assert (": because" in cost_growth.growth_text(found)) is faster
    assert found.floor == pytest.approx(1.0)


def test_a_row_shows_cost_floor_and_ratio() -> None:
    table = cost_growth.table_of({"experts": points(1.0)})
    assert [next(iter(column.cells)) for column in table.columns][:5] == [
        "experts",
        "8",
        "40000",
        "8000",
        "5.00",
    ]
