"""The commands that tools print: what a shell makes of them is the run that was meant."""

from __future__ import annotations

import argparse
import json
import random
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from pretrain.config.load import load_recipe, read_recipe_file
from pretrain.config.next_command import fewest_ranks, next_command, training_command
from pretrain.config.rules.sections import check_topology
from pretrain.run.arguments import parse_arguments
from tests.support.paths import ROOT
from tools import preprocess_data

NASTY = [
    "my own",
    "a'b",
    'c"d',
    "e$HOME",
    "f;g",
    "h*i",
    "ü",
    "#j",
    "k: l",
    "[m]",
    "{n}",
    "-o",
    "~p",
]
OPTIONS: list[list[list[str]]] = [
    [[], ["--recipe", "debug"], ["--recipe", "h64lm_mini"], ["--recipe", "moe_1b"]],
    [[], ["--input", "NASTY.txt"], ["--input", "NASTY.jsonl", "NASTY.txt"]],
    [[], ["--tokenizer", "NASTY.json"], ["--tokenizer", "NASTY.model"], ["--vocab-size", "777"]],
    [[], ["--append-eod"], ["--no-append-eod"]],
    [[], ["--validation-share", "0.25"], ["--validation-documents", "7"]],
    [[], ["--set", "data.path=somewhere else"]],
    [[], ["--split-by", "content"]],
    [[], ["--max-shard-bytes", "70000"], ["--set", "data.max_shard_bytes=null"]],
    [[], ["--on-bad", "fail"]],
    [[], ["--set", "data.document_mask=true"]],
    [[], ["--set", "data.cleaning.normalize={form: NFKC}"]],
    [[], ["--set", "train.micro_batch_size=1"], ["--set", "run_path=my 'own' run"]],
    [[], ["--set", "data.mixture={kind: weights, weights: {all: 2.0}}"]],
    [[], ["--set", "data.max_bad_share=0.5"], ["--max-bad-share", "0.75"]],
]


def drawn(source: random.Random, folder: Path) -> list[str]:
    """Options of one build; file names are of characters that a shell or YAML would read."""
    words = [word for choices in OPTIONS for word in source.choice(choices)]
    for number, word in enumerate(words):
        if "NASTY" in word:
            words[number] = word.replace("NASTY", f"{folder}/{source.choice(NASTY)}{number}", 1)
            Path(words[number]).touch()
    if "somewhere" in str(words) and source.random() < 0.5:
        return words
    return [*words, "--output", f"{folder}/{source.choice(NASTY)} out"]


def built_with(words: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any, Any]:
    monkeypatch.setattr(sys, "argv", ["preprocess_data.py", *words])
    arguments = preprocess_data.parse_arguments()
    recipe, output = preprocess_data.data_section(arguments)
    return arguments, recipe, output


def trained_by(command: str) -> Any:
    """The options and the recipe of a command line, as a shell and the trainer read it."""
    words = shlex.split(command)
    assert words[:2] == ["deepspeed", "--num_accelerators"]
    options = parse_arguments(words[4:])
    return int(words[2]), load_recipe(options.recipe, options.overrides)


@pytest.mark.parametrize("seed", range(60))
def test_the_next_command_trains_the_data_section_that_was_built(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = random.Random(seed)
    words = drawn(source, tmp_path)
    arguments, built, output = built_with(words, monkeypatch)
    recipe = arguments.recipe or preprocess_data.EXAMPLE_RECIPE
    command = next_command(recipe, arguments.overrides, built, output.path)
    ranks, trained = trained_by(command)
    assert trained.data_path == str(output.path)
    expected = built.data.model_dump() | {"path": str(output.path), "corpora": None}
    assert trained.data.model_dump() == expected, command
    check_topology(trained, ranks, 1)
    for override in arguments.overrides:
        field, _, value = override.partition("=")
        if field == "run_path":
            assert trained.run_path == value
        if field == "train.micro_batch_size":
            assert trained.train.micro_batch_size == 1


def test_a_share_replaces_the_number_of_held_out_documents_of_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, _ = read_recipe_file("debug")
    content["data"]["validation_documents"] = 7
    name = str(tmp_path / "exact.yaml")
    Path(name).write_text(json.dumps(content))
    assert load_recipe(name).data.validation_documents == 7
    words = ["--recipe", name, "--validation-share", "0.25", "--output", str(tmp_path)]
    arguments, built, output = built_with(words, monkeypatch)
    _, trained = trained_by(next_command(name, arguments.overrides, built, output.path))
    for recipe in (built, trained):
        assert recipe.data.validation_share == 0.25 and recipe.data.validation_documents is None


def test_a_share_and_a_number_of_held_out_documents_are_refused_together(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--validation-share", "0.25", "--validation-documents", "7", "--output", "x"]
    with pytest.raises(SystemExit) as refused:
        built_with(words, monkeypatch)
    assert refused.value.code == 2
    message = capsys.readouterr().err
    assert "--validation-documents: not allowed with argument --validation-share" in message


def test_what_the_recipe_says_already_is_not_said_again() -> None:
    built = load_recipe("debug")
    command = next_command("debug", [], built, Path("data/debug"))
    assert "--set" not in shlex.split(command)


def test_as_many_ranks_as_the_recipe_needs() -> None:
    recipe = load_recipe("moe_1b")
    assert recipe.parallel.ep_size > 2
    assert fewest_ranks(recipe, 2) % recipe.parallel.ep_size == 0
    odd = load_recipe("debug", ["train.global_batch_size=9", "train.micro_batch_size=3"])
    assert fewest_ranks(odd, 2) == 3
    one = load_recipe("debug", ["train.global_batch_size=8", "train.micro_batch_size=8"])
    assert fewest_ranks(one, 2) == 1


def test_plugins_ds_config_and_launcher_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "pretrain.config.next_command.plugin_arguments", lambda: ["--plugin", "my.parts"]
    )
    monkeypatch.chdir(ROOT)
    command = training_command("my recipe.yaml", ["a.b=c d"], ranks=4, ds_config="my zero.json")
    assert shlex.split(command) == [
        *("deepspeed", "--num_accelerators", "4", "launchers/pretrain.py"),
        *("--ds_config", "my zero.json", "--plugin", "my.parts"),
        *("--recipe", "my recipe.yaml", "--set", "a.b=c d"),
    ]
    assert training_command("debug").startswith("python launchers/pretrain.py --ds_config zero1")


@pytest.mark.parametrize("seed", range(20))
def test_the_command_that_continues_a_sweep_keeps_how_it_is_run(seed: int, tmp_path: Path) -> None:
    from pretrain.sweeps.launch import continuing_command
    from pretrain.sweeps.options import add_sweep_options

    source = random.Random(seed)
    parser = argparse.ArgumentParser()
    add_sweep_options(parser)
    words = ["--output", f"{tmp_path}/{source.choice(NASTY)} sweep"]
    for option in (["--slots", "3"], ["--no-keep-going"], ["--retry-failed"], ["--json", "a b"]):
        words += option * source.randrange(2)
    options = parser.parse_args(words)
    line = shlex.join(continuing_command(options, ROOT / "tools" / "sweep.py"))
    tool, *again = shlex.split(line)
    assert tool.endswith("tools/sweep.py") and parser.parse_args(again) == options


def test_rows_and_splits_of_data_sets_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for more in (
        ["--max-samples", "1000", "--validation-documents", "50"],
        ["--set", "data.source.validation_split=test", "--set", "data.source.group=rows"],
    ):
        words = ["--recipe", "h64lm_phase1", *more]
        arguments, built, output = built_with(words, monkeypatch)
        _, trained = trained_by(
            next_command(arguments.recipe, arguments.overrides, built, output.path)
        )
        assert trained == built
