"""Mixtures of the user's own data sets as an axis, and what of a file of them is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain.config.load import load_recipe
from pretrain.core.errors import ConfigError
from pretrain.sweeps.axes import parse_axis
from pretrain.sweeps.mixes import read_custom_datasets
from tools import run_ablations

CORPORA = {"web": "data/web", "code": "data/code"}
MIXES = {"web": {"web": 0.8, "code": 0.2}, "balanced": {"web": 1, "code": 1}}


def write(folder: Path, content: object) -> str:
    path = folder / "mixes.yaml"
    path.write_text(
        content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False)
    )
    return str(path)


def test_a_file_replaces_the_data_of_the_base_and_the_first_mixture_is_the_bases(
    tmp_path: Path,
) -> None:
    path = write(tmp_path, {"data": {"corpora": CORPORA}, "mixes": MIXES})
    overrides, values = read_custom_datasets(path)
    base = load_recipe("peer_mla_mini", overrides)
    assert base.data.corpora == CORPORA and base.data.path is None
    axis = parse_axis("data_mix", values)
    assert [choice.label for choice in axis.options] == ["web", "balanced"]
    weights = [
        load_recipe("peer_mla_mini", [*overrides, *choice.overrides]).data.mixture.model_dump()
        for choice in axis.options
    ]
    assert [found["weights"] for found in weights] == [MIXES["web"], MIXES["balanced"]]
    assert base.data.mixture.model_dump() == weights[0]


def test_sources_of_a_file_replace_the_single_source_of_the_base(tmp_path: Path) -> None:
    sources = {name: {"kind": "text", "input": [f"{name}.txt"]} for name in CORPORA}
    path = write(tmp_path, {"data": {"path": "d", "sources": sources}, "mixes": MIXES})
    data = load_recipe("peer_mla_mini", read_custom_datasets(path)[0]).data
    assert list(data.named_sources) == ["web", "code"] and data.path == "d"


@pytest.mark.parametrize(
    "content,told",
    [
        ("{a: ", "is not valid YAML"),
        ("[1]", "has other keys than 'data' and 'mixes'"),
        ({"mixes": MIXES, "more": 1}, "has other keys than 'data' and 'mixes'"),
        ({"data": {"corpora": CORPORA}}, "has no named mixtures"),
        ({"mixes": {}}, "has no named mixtures"),
        ({"mixes": {"web": {}}}, "mixes.web names no source"),
        ({"mixes": {"web": {"web": -1}}}, "the share of web is -1: give a number from 0"),
        ({"mixes": {"web": {"web": True}}}, "the share of web is True"),
        ({"mixes": {"web": {"web": float("nan")}}}, "the share of web is nan"),
        (
            {"data": {"corpora": CORPORA}, "mixes": {"web": {"pile": 1}}},
            "mixes.web names pile, but there are web, code",
        ),
        (b"\xff\xfe\x00".decode("latin-1"), "YAML|keys"),
    ],
)
def test_what_is_no_file_of_mixtures_is_refused_in_a_sentence(
    tmp_path: Path, content: object, told: str
) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        read_custom_datasets(write(tmp_path, content))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("data: {corpora: {a: data/a}}\nmixes: {m: {a: .inf}}", "the share of a is inf"),
        ("data: {corpora: {a: data/a}, path: 2026-01-01}\nmixes: {m: {a: 1}}", "put it in quotes"),
    ],
)
def test_values_that_no_recipe_holds_are_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "mixes.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_custom_datasets(str(path))


def test_a_file_that_is_not_there_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_custom_datasets(str(tmp_path / "none.yaml"))
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        read_custom_datasets(str(tmp_path / "bytes.yaml"))


def design(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    monkeypatch.setattr(sys, "argv", ["run_ablations.py", *arguments])
    return run_ablations.design(run_ablations.parse_arguments())


def test_the_options_of_the_published_command_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, {"data": {"corpora": CORPORA}, "mixes": MIXES})
    made = design(
        monkeypatch,
        *("peer_mla", "--base-config", "peer_mla_mini", "--output-dir", str(tmp_path / "out")),
        *("--gpus", "2", "--axes", "data_mix", "product", "--tokens", "5000000000", "--resume"),
        *("--custom-datasets", path, "--set", "seed=7"),
    )
    assert (made.ranks, made.train_tokens, list(made.axes)) == (
        2,
        5_000_000_000,
        ["product", "data_mix"],
    )
    assert list(made.axes["data_mix"]) == ["web", "balanced"]
    assert made.base["data"]["corpora"] == CORPORA and made.base["seed"] == 7
    alone = design(
        monkeypatch,
        *("--recipe", "peer_mla_mini", "--custom-datasets", path, "--output", str(tmp_path)),
    )
    assert list(alone.axes) == ["data_mix"]
    with pytest.raises(ConfigError, match="needs a recipe: give --recipe"):
        design(monkeypatch, "--custom-datasets", path, "--output", str(tmp_path))


def test_only_an_ablation_that_is_there_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["peer_mla_mini", "--resume", "--output", str(tmp_path / "none")]
    monkeypatch.setattr(sys, "argv", [run_ablations.__file__, *arguments])
    with pytest.raises(ConfigError, match="holds no sweep to continue: leave --resume out"):
        run_ablations.main()
    assert not (tmp_path / "none").exists()
