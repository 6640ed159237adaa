"""``base:`` lays a recipe over another one: merging, chains, circles, and what errors name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain.config.load import load_recipe, merge, read_recipe_file, recipe_to_yaml
from pretrain.core.errors import ConfigError


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    "lower,upper,merged",
    [
        ({"a": 1, "b": 2}, {"b": 3, "c": 4}, {"a": 1, "b": 3, "c": 4}),
        ({"a": {"b": {"c": 1, "d": 2}}}, {"a": {"b": {"c": 3}}}, {"a": {"b": {"c": 3, "d": 2}}}),
        ({"a": [1, 2]}, {"a": [3]}, {"a": [3]}),
        ({"a": {"kind": "x", "b": 1}}, {"a": {"b": 2}}, {"a": {"kind": "x", "b": 2}}),
        (
            {"a": {"kind": "x", "b": 1}},
            {"a": {"kind": "x", "c": 2}},
            {"a": {"kind": "x", "b": 1, "c": 2}},
        ),
        ({"a": {"kind": "x", "b": 1}}, {"a": {"kind": "y", "c": 2}}, {"a": {"kind": "y", "c": 2}}),
        ({"a": {"b": 1}}, {"a": {"kind": "y", "c": 2}}, {"a": {"kind": "y", "c": 2}}),
        ({"a": 1, "b": 2}, {"a": None}, {"b": 2}),
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": None}}, {"a": {"c": 2}}),
        ({"a": 1}, {"b": None}, {"a": 1, "b": None}),
        ({"a": 1}, {"a": {"b": 2}}, {"a": {"b": 2}}),
        ({"a": {"b": 2}}, {"a": 1}, {"a": 1}),
        ({"a": None}, {"a": {"b": 2}}, {"a": {"b": 2}}),
    ],
)
def test_mappings_merge_key_by_key(
    lower: dict[str, Any], upper: dict[str, Any], merged: dict[str, Any]
) -> None:
    before = repr((lower, upper))
    assert merge(lower, upper) == merged
    assert repr((lower, upper)) == before


def test_a_shipped_recipe_is_a_base_by_its_name(tmp_path: Path) -> None:
    mine = load_recipe(
        write(
            tmp_path,
            "mine.yaml",
            "base: debug\nname: mine\ntrain: {micro_batch_size: 4}\nmodel: {moe: {top_k: 1}}\n",
        )
    )
    plain = load_recipe("debug", ["name=mine", "train.micro_batch_size=4", "model.moe.top_k=1"])
    assert mine == plain != load_recipe("debug", ["name=mine"])


def test_another_kind_brings_none_of_the_old_ones_fields(tmp_path: Path) -> None:
    text = (
        "base: debug\nname: mine\noptimizer: {kind: sgd, learning_rate: 0.1}\nmodel: {moe: {kind:"
        " deepspeed, num_experts: 8, "
    )
    mine = load_recipe(
        write(tmp_path, "mine.yaml", text + "top_k: 1, moe_intermediate_size: 16, gate: router}}\n")
    )
    assert mine.optimizer.kind == "sgd" and mine.optimizer.weight_decay == 0.0
    assert (
        mine.model.moe is not None
        and mine.model.moe.kind == "deepspeed"
        and mine.model.moe.num_experts == 8
    )
    with pytest.raises(ConfigError, match=r"'model\.moe\.num_experts' is missing"):
        load_recipe(
            write(
                tmp_path, "bare.yaml", "base: debug\nname: bare\nmodel: {moe: {kind: deepspeed}}\n"
            )
        )


def test_null_gives_the_default_back(tmp_path: Path) -> None:
    mine = load_recipe(
        write(
            tmp_path,
            "mine.yaml",
            "base: quickstart\nname: mine\nmodel: {position: null}\nparallel: null\ndata: {source:"
            " null}\n",
        )
    )
    assert (
        mine.model.position.kind == "rope"
        and mine.parallel.ep_size == 1
        and mine.data.source is None
    )
    with pytest.raises(ConfigError, match=r"'model\.attention' is missing"):
        load_recipe(
            write(tmp_path, "bare.yaml", "base: quickstart\nname: bare\nmodel: {attention: null}\n")
        )


def test_null_stays_where_the_base_says_nothing(tmp_path: Path) -> None:
    """A null can be a choice of its own: one file of any size."""
    assert (
        load_recipe(
            write(tmp_path, "mine.yaml", "base: debug\nname: mine\ndata: {max_shard_bytes: null}\n")
        ).data.max_shard_bytes
        is None
    )
    assert load_recipe("debug").data.max_shard_bytes is not None


def test_paths_are_seen_from_the_file_that_names_them_and_chains_merge_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(
        tmp_path,
        "family/lower.yaml",
        "base: debug\nname: lower\nseed: 5\ntrain: {micro_batch_size: 1, train_tokens: 4096}\n",
    )
    write(
        tmp_path,
        "family/middle.yaml",
        "base: lower.yaml\nname: middle\ntrain: {micro_batch_size: 4}\n",
    )
    upper = write(tmp_path, "mine/upper.yaml", "base: ../family/middle.yaml\nname: upper\n")
    monkeypatch.chdir(tmp_path / "mine")
    for spelled in (upper, "upper.yaml"):
        recipe = load_recipe(spelled)
        assert (
            recipe.name,
            recipe.seed,
            recipe.train.micro_batch_size,
            recipe.train.train_tokens,
        ) == ("upper", 5, 4, 4096)


def test_a_file_may_have_the_name_of_its_shipped_base(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, "debug.yaml", "base: debug\nseed: 9\n")).seed == 9


def test_overrides_come_last(tmp_path: Path) -> None:
    mine = write(
        tmp_path, "mine.yaml", "base: debug\nname: mine\nseed: 5\ntrain: {micro_batch_size: 4}\n"
    )
    recipe = load_recipe(mine, ["seed=6", "model.moe.top_k=1"])
    assert (recipe.seed, recipe.train.micro_batch_size) == (6, 4)
    assert recipe.model.moe is not None and recipe.model.moe.top_k == 1


def test_what_is_printed_and_saved_stands_by_itself(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, "mine.yaml", "base: debug\nname: mine\n"))
    text = recipe_to_yaml(recipe)
    assert "base" not in yaml.safe_load(text)
    assert load_recipe(write(tmp_path / "elsewhere", "saved.yaml", text)) == recipe
    assert "base" not in read_recipe_file(str(tmp_path / "mine.yaml"))[0]


@pytest.mark.parametrize(
    "files,parts",
    [
        (
            {"mine": "base: mine.yaml\n"},
            ["mine.yaml", "leads back to itself", "mine.yaml -> mine.yaml"],
        ),
        (
            {"mine": "base: a.yaml\n", "a": "base: b.yaml\n", "b": "base: a.yaml\n"},
            ["a.yaml", "mine.yaml -> a.yaml -> b.yaml -> a.yaml"],
        ),
        (
            {"mine": "base: quikstart\n"},
            ["mine.yaml", "'base'", "no recipe 'quikstart'", "did you mean 'quickstart'"],
        ),
        (
            {"mine": "base: a.yaml\n", "a": "base: gone.yaml\n"},
            ["a.yaml: 'base'", "no recipe 'gone.yaml'"],
        ),
        ({"mine": "base: [debug]\n"}, ["mine.yaml", "'base' is the name or the path", "['debug']"]),
        ({"mine": "base: null\n"}, ["mine.yaml", "'base' is the name or the path"]),
        ({"mine": "base: a.yaml\n", "a": "just words\n"}, ["a.yaml holds no mapping"]),
        ({"mine": "base: a.yaml\n", "a": "a: [1\n"}, ["a.yaml is not valid YAML"]),
        (
            {"mine": "base: a.yaml\n", "a": "base: debug\nmodl: {}\n"},
            ["mine.yaml on ", "a.yaml on ", "debug.yaml: unknown field 'modl'"],
        ),
    ],
)
def test_what_is_wrong_is_named_with_its_file(
    tmp_path: Path, files: dict[str, str], parts: list[str]
) -> None:
    for name, text in files.items():
        write(tmp_path, f"{name}.yaml", text)
    with pytest.raises(ConfigError) as caught:
        load_recipe(str(tmp_path / "mine.yaml"))
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_base_belongs_into_a_file() -> None:
    with pytest.raises(ConfigError, match="unknown field 'base'"):
        load_recipe("debug", ["base=quickstart"])
