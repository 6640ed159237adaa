"""What can be varied and how: the three forms of an axis, the points they span, names, and what is
refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pretrain.core.errors import ConfigError
from pretrain.sweeps.axes import (
    Axis,
    file_name,
    grid,
    one_at_a_time,
    parse_axis,
    parse_axis_option,
    read_axes_file,
    with_seeds,
    without_equal_names,
)

EXPERTS = {
    "few": {"model.moe.num_experts": 4, "model.moe.top_k": 1},
    "many": {"model.moe.num_experts": 8},
}


def axis(text: str) -> Axis:
    return parse_axis(*parse_axis_option(text))


def test_a_list_is_values_of_one_field_written_as_overrides() -> None:
    found = axis("model.moe.product_key_sizes=[[8, 8], [16, 16]]")
    assert [choice.overrides for choice in found.options] == [
        ("model.moe.product_key_sizes=[8, 8]",),
        ("model.moe.product_key_sizes=[16, 16]",),
    ]
    assert [choice.number for choice in axis("optimizer.learning_rate=[1e-4, 2]").options] == [
        1e-4,
        2.0,
    ]


def test_a_mapping_names_sets_of_fields() -> None:
    found = parse_axis("experts", EXPERTS)
    assert [(choice.label, choice.overrides) for choice in found.options] == [
        ("few", ("model.moe.num_experts=4", "model.moe.top_k=1")),
        ("many", ("model.moe.num_experts=8",)),
    ]


@pytest.mark.parametrize(
    "text,numbers",
    [
        ("optimizer.learning_rate=log:1e-4:1e-2:3", [1e-4, 1e-3, 1e-2]),
        ("optimizer.beta2=linear:0.9:0.99:4", [0.9, 0.93, 0.96, 0.99]),
        ("model.moe.top_k=int:1:3:9", [1, 2, 3]),
    ],
)
def test_a_range_has_as_many_values_as_a_grid_asks_for(text: str, numbers: list[float]) -> None:
    found = axis(text)
    assert [choice.number for choice in found.options] == pytest.approx(numbers)
    assert all(
        choice.overrides == (f"{found.name}={choice.number:g}",) or "0.0" in choice.overrides[0]
        for choice in found.options
    )


def test_what_is_shown_of_a_value_is_what_is_used() -> None:
    choice = axis("optimizer.learning_rate=log:1e-4:1e-2").at(0.00123456789)
    assert (choice.label, choice.overrides, choice.number) == (
        "0.001235",
        ("optimizer.learning_rate=0.001235",),
        0.001235,
    )


@pytest.mark.parametrize(
    "text,told",
    [
        ("optimizer.learning_rate", "write it as --axis section.field="),
        ("a.b=log:1e-2:1e-4", "LOW must be below HIGH"),
        ("a.b=log:0:1", "above 0 for log"),
        ("a.b=linear:1:2:1", "COUNT at least 2"),
        ("a.b=cubic:1:2", "is no range"),
        ("a.b=log:1", "is no range"),
        ("a.b=3", "no list of values, no range"),
        ("a.b=[]", "no list of values, no range"),
        ("a.b={x: 1}", "no mapping of names to fields"),
        ("a.b=[1, 1]", "1 is there twice"),
    ],
)
def test_what_is_no_axis_is_told_in_a_sentence(text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        axis(text)


def test_a_grid_is_every_combination_under_short_names() -> None:
    points = grid([parse_axis("experts", EXPERTS), axis("optimizer.learning_rate=[1e-3, 2e-3]")])
    assert [point.name for point in points] == [
        f"experts={count},learning_rate={rate}"
        for count in ("few", "many")
        for rate in ("0.001", "0.002")
    ]
    assert points[0].overrides == [
        "model.moe.num_experts=4",
        "model.moe.top_k=1",
        "optimizer.learning_rate=0.001",
    ]


def test_names_grow_until_they_tell_axes_apart() -> None:
    points = grid([axis("a.size=[1]"), axis("b.size=[2]")])
    assert points[0].name == "a.size=1,b.size=2"


def test_one_axis_at_a_time_starts_with_the_base_and_never_joins_values() -> None:
    points = one_at_a_time([parse_axis("experts", EXPERTS), axis("seed=[1, 2]")])
    assert [point.name for point in points] == [
        "base",
        "experts=few",
        "experts=many",
        "seed=1",
        "seed=2",
    ]
    assert points[0].overrides == [] and points[3].overrides == ["seed=1"]


def test_a_range_without_a_count_is_refused_in_a_grid() -> None:
    with pytest.raises(ConfigError, match="write log:0.0001:0.01:COUNT"):
        grid([axis("optimizer.learning_rate=log:1e-4:1e-2")])


def test_seeds_multiply_points_and_keep_their_group() -> None:
    points = with_seeds(grid([axis("model.moe.top_k=[1, 2]")]), [3, 4])
    assert [(point.name, point.group, point.overrides[-1]) for point in points] == [
        (f"top_k={k},seed={seed}", f"top_k={k}", f"seed={seed}") for k in (1, 2) for seed in (3, 4)
    ]
    with pytest.raises(ConfigError, match="is there twice"):
        with_seeds(points, [1, 1])


def test_folder_names_are_safe_short_and_distinct() -> None:
    assert (
        file_name("../x y=[1, 2]") == file_name("../x y=[1, 2]")
        and "/" not in file_name("../x")
        and not file_name("../x").startswith(".")
    )
    long = file_name("a" * 300)
    assert len(long) <= 100 and long != file_name("a" * 301)
    same = without_equal_names(grid([parse_axis("a", {"x y": {"seed": 1}, "x_y": {"seed": 2}})]))
    assert [point.name for point in same] == ["a=x_y", "a=x_y-2"] and [
        point.run for point in same
    ] == ["a=x_y", "a=x_y-2"]


@pytest.mark.parametrize(
    "content,told",
    [
        ("axes: {}", "holds no axes"),
        ("[1]", "holds no axes"),
        ("{base: debug, axes: {a: [1]}, more: 1}", "unknown field 'more'"),
        ("{base: [1], axes: {a: [1]}}", "'base' is the name"),
        ("{a: ", "not valid YAML"),
    ],
)
def test_a_file_that_holds_no_axes_is_told(tmp_path: Path, content: str, told: str) -> None:
    (tmp_path / "axes.yaml").write_text(content)
    with pytest.raises(ConfigError, match=told):
        read_axes_file(str(tmp_path / "axes.yaml"))


def test_a_base_beside_the_file_is_found_and_shipped_files_go_by_name(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: mine")
    (tmp_path / "axes.yaml").write_text("{base: mine.yaml, axes: {a: [1]}}")
    expected: tuple[str, dict[str, Any]] = (str(tmp_path / "mine.yaml"), {"a": [1]})
    assert read_axes_file(str(tmp_path / "axes.yaml")) == expected
    assert read_axes_file("moe")[0] == "quickstart"
    with pytest.raises(ConfigError, match="shipped ones are moe, peer_mla"):
        read_axes_file("nothing")
