"""Every small copy of a published model learns, saves, resumes, is scored and generates.

The training command runs it on two ranks.

The one with the most kinds runs always, for a few steps; all of them, for longer, with ``-m full``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch

from data_pipeline.preprocess.coordinator import build
from data_pipeline.preprocess.workspace import Output
from data_pipeline.sources.python_stdlib import stdlib_folder
from pretrain.checkpoint.layout import step_folder
from pretrain.config.load import load_recipe
from pretrain.evaluation.generation.generate import generate
from pretrain.evaluation.generation.generators import open_generator
from pretrain.evaluation.generation.sampling import Sampling
from pretrain.evaluation.heldout.heldout import score_checkpoint
from pretrain.run.folder import CHECKPOINTS
from tests.support.ranks import Results, run_cases
from tests.support.small_recipes import SMALL_RECIPES, overrides_without_chance, richest

VOCAB_SIZE = 512
RICHEST = richest(SMALL_RECIPES)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Length:
    """How long runs are, and by how many nats a token the loss has to fall in them."""

    steps: int
    fall: float

    @property
    def saved_at(self) -> int:
        return self.steps // 2


SHORT, LONG = Length(20, 0.4), Length(50, 0.7)
CHOICES = [pytest.param((RICHEST, SHORT), id=f"{RICHEST}, 20 steps")] + [
    pytest.param(
        (name, LONG), id=f"{name}, 50 steps", marks=[pytest.mark.full, pytest.mark.timeout(3600)]
    )
    for name in SMALL_RECIPES
]


@dataclass(frozen=True)
class Runs:
    """One recipe's runs: as it is shipped, cut back and gone on with; and with nothing left to
    chance, its experts whole on each rank, or spread
    over both. ``chance`` is as shipped, but with whole experts, where the recipe leaves anything to
    chance.
    """

    length: Length
    folder: Path
    shipped: dict[str, Any]
    whole: dict[str, Any]
    spread: dict[str, Any]
    chance: dict[str, Any] | None

    @property
    def checkpoint(self) -> Path:
        return step_folder(self.folder / CHECKPOINTS, self.length.steps)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build of some modules of the standard library, with a small vocabulary."""
    folder, library = tmp_path_factory.mktemp("mini") / "data", stdlib_folder()
    source = (
        f"data.source={{kind: text, input: ['{library}/email/*.py', '{library}/json/*.py',"
        f" '{library}/logging/*.py']}}"
    )
    overrides = [
        source,
        f"data.tokenizer={{kind: train_bpe, vocab_size: {VOCAB_SIZE}}}",
        "data.validation_share=0.1",
    ]
    build(load_recipe("debug", overrides).data, Output(folder))
    return folder


def case(
    name: str, label: str, data: Path, folder: Path, length: Length, *overrides: str, **extra: int
) -> dict[str, Any]:
    run, tokens = (
        folder / f"{name}-{label}",
        length.steps * SMALL_RECIPES[name].train.tokens_per_step,
    )
    settings = [
        f"data.path={data}", f"model.vocab_size={VOCAB_SIZE}", f"run_path={run}",
        f"train.train_tokens={tokens}", "logging.interval_steps=1",
        f"checkpoint.interval_steps={length.saved_at}",
        f"validation.interval_steps={length.saved_at}", "logging.tensorboard=false", *overrides,
    ]  # fmt: skip
    arguments = ["--recipe", name, *(part for setting in settings for part in ("--set", setting))]
    return {"name": run.name, "run_path": str(run), "arguments": arguments, **extra}


def run_recipes(names: list[str], data: Path, folder: Path, length: Length) -> dict[str, Runs]:
    """All runs of these recipes in one start of two ranks.

    What a recipe leaves to chance is run without it as well.
    """
    cases = []
    for name in names:
        without = overrides_without_chance(SMALL_RECIPES[name])
        cases.append(
            case(
                name,
                "shipped",
                data,
                folder,
                length,
                "parallel.ep_size=2",
                resume_at=length.saved_at,
            )
        )
        cases.append(case(name, "whole", data, folder, length, *without, "parallel.ep_size=1"))
        if without:
            cases.append(case(name, "spread", data, folder, length, *without, "parallel.ep_size=2"))
            cases.append(case(name, "chance", data, folder, length, "parallel.ep_size=1"))
    results: Results = run_cases("training_runs", cases, 2, folder)
    found = {}
    for name in names:
        shipped = results[f"{name}-shipped"]
        spread = results.get(f"{name}-spread", shipped)
        found[name] = Runs(
            length,
            folder / f"{name}-shipped",
            shipped,
            results[f"{name}-whole"],
            spread,
            results.get(f"{name}-chance"),
        )
    return found


@pytest.fixture(scope="module")
def short(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Runs]:
    return run_recipes([RICHEST], data, tmp_path_factory.mktemp("short"), SHORT)


@pytest.fixture(scope="module")
def long(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Runs]:
    return run_recipes(list(SMALL_RECIPES), data, tmp_path_factory.mktemp("long"), LONG)


@pytest.fixture
def runs(choice: tuple[str, Length], request: pytest.FixtureRequest) -> Runs:
    name, length = choice
    found: dict[str, Runs] = request.getfixturevalue("short" if length is SHORT else "long")
    return found[name]


every_mini = pytest.mark.parametrize("choice", CHOICES)


def steps_of(run: dict[str, Any], kind: str = "train") -> list[dict[str, Any]]:
    return [row for row in run["curve"] if row["kind"] == kind]


def equal_choices(run: dict[str, Any], other: dict[str, Any]) -> int:
    """Steps, from the first one on, in which every expert of every layer got as many tokens in both
    runs; all of them with PEER, which does not
    say, and where a choice that rounding makes is between experts of nearly the same, small weight.
    """
    loads = (
        [[layer["expert_load"] for layer in row.get("layers", [])] for row in steps_of(of)]
        for of in (run, other)
    )
    same = [first == second for first, second in zip(*loads, strict=True)]
    return (same + [False]).index(False)


def equal_losses(run: dict[str, Any], other: dict[str, Any], steps: int) -> bool:
    """Whether the first ``steps`` have the same losses but for rounding: to 1e-6 in the first ten,
    to 1e-4 after them, because AdamW makes more
    of a rounding with every step, and most of it where the gradient's norm leaps."""
    pairs = list(zip(steps_of(run), steps_of(other), strict=True))[:steps]
    return all(
        row[name] == pytest.approx(expected[name], rel=1e-6 if row["step"] <= 10 else 1e-4, abs=0)
        for row, expected in pairs
        for name in ("loss", "total_loss")
    )


@every_mini
def test_the_loss_falls_as_the_recipe_is_shipped(runs: Runs) -> None:
    curve = [row["loss"] for row in steps_of(runs.shipped)]
    assert len(curve) == runs.length.steps and set(runs.shipped["codes"]) == {0}
    assert mean(curve[-5:]) < mean(curve[:5]) - runs.length.fall


@every_mini
def test_a_resumed_run_repeats_every_digit(runs: Runs) -> None:
    assert runs.shipped["resumed_from"] == runs.length.saved_at
    assert runs.shipped["resumed"] == runs.shipped["curve"]


@every_mini
def test_experts_on_two_ranks_give_the_run_of_experts_on_one(runs: Runs) -> None:
    """Until a token is so undecided between two experts that rounding chooses: from then on they
    are two runs.

    Without dropout, because its masks are drawn by each rank for the rows that reach it, in their
    order there.
    """
    steps = equal_choices(runs.spread, runs.whole)
    assert steps >= 5 and equal_losses(runs.spread, runs.whole, steps)
    if runs.chance is not None:
        assert not equal_losses(runs.shipped, runs.chance, 5)


@every_mini
def test_scoring_the_checkpoint_gives_the_last_validation_loss(runs: Runs) -> None:
    score = score_checkpoint(runs.checkpoint, None, "validation", CPU, baselines=())
    middle, *_, last = (row["validation_loss"] for row in steps_of(runs.shipped, "validation"))
    assert score.loss == pytest.approx(last, rel=1e-6)
    assert score.loss != pytest.approx(middle, rel=1e-3)


@every_mini
def test_the_checkpoint_generates(runs: Runs) -> None:
    generator = open_generator(runs.checkpoint, CPU)
    prompt = generator.encode("def close(self):")
    texts = [
        generate(generator.start(len(prompt) + 16), prompt, Sampling(seed=seed), -1, range(16))
        for seed in (1, 1, 2)
    ]
    assert [len(text) for text in texts] == [16, 16, 16]
    assert texts[0] == texts[1] != texts[2]
    assert generator.decode(texts[0])
