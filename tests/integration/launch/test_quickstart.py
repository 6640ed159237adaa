"""The whole main job by its own script, on a tiny recipe: corpus to shards to two ranks to
evaluation, export and text; then again.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT
from tests.support.tiny_run import Started, Tiny, wait_for_step

FIELDS = (
    "train_tokens", "tokens_per_second", "parameters_total", "parameters_active", "validation_loss",
    "perplexity", "bigram_loss", "bits_per_byte",
    "export_max_logit_difference", "wall_seconds", "reused", "sample",
)  # fmt: skip


def quickstart(tiny: Tiny, run: Path, *overrides: str, tokens: int) -> list[str | Path]:
    settings = ["parallel.ep_size=2", f"run_path={run}", f"train.train_tokens={tokens}", *overrides]
    return [
        sys.executable,
        ROOT / "tools" / "quickstart.py",
        "--recipe",
        str(tiny.recipe),
        "--prompt",
        "the router",
        *(part for setting in settings for part in ("--set", setting)),
    ]


@pytest.fixture(scope="module")
def twice(
    tiny: Tiny, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]], list[str]]:
    """The run's folder, what summary.json said after the first and the second start, and what they
    printed.
    """
    run = tmp_path_factory.mktemp("quickstart") / "run"
    command = quickstart(
        tiny, run, "logging.tensorboard=true", "model.max_position_embeddings=128", tokens=1280
    )
    summaries, printed = [], []
    for _ in range(2):
        started = Started(command, tiny.folder)
        assert started.wait() == 0, started.stdout + started.stderr
        assert started.survivors() == []
        summaries.append(json.loads((run / "summary.json").read_text()))
        printed.append(started.stdout + started.stderr)
    return run, summaries, printed


def test_the_main_job_runs_whole_and_leaves_everything_in_its_place(
    twice: tuple[Path, list[dict[str, Any]], list[str]],
) -> None:
    run, (first, _), (printed, _) = twice
    assert all(first[field] is not None for field in FIELDS)
    assert first["train_tokens"] == 1280
    assert first["export_max_logit_difference"] <= 1e-4
    assert first["sample"].startswith("the router")
    assert first["validation_loss"] == pytest.approx(first["validation_loss_in_training"], abs=1e-4)
    assert list(first["seconds_by_stage"]) == ["data", "train", "evaluate", "convert", "generate"]
    for name in (
        "checkpoints/latest",
        "metrics.jsonl",
        "training_log.csv",
        "training_curves.png",
        "log.txt",
        "hf/config.json",
    ):
        assert (run / name).stat().st_size > 0, name
    assert any((run / "tensorboard").rglob("events.out.tfevents.*"))
    for command in (
        "tools/preprocess_data.py --recipe",
        "deepspeed --num_accelerators 2 launchers/pretrain.py --ds_config",
        "tools/evaluate.py --checkpoint",
    ):
        assert command in printed.replace(f"{ROOT}/", "")


def test_the_terminal_shows_stages_progress_and_summary_and_logs_have_the_rest(
    twice: tuple[Path, list[dict[str, Any]], list[str]],
) -> None:
    run, _, (printed, again) = twice
    for noise in ("[INFO]", "[WARNING]", "deepspeed.launcher", "world_info", "Setting accelerator"):
        assert noise not in printed + again, noise
    names = ("data", "train", "evaluate", "convert", "generate")
    places = [printed.index(f"[{number}/5] {name}: ") for number, name in enumerate(names, 1)]
    assert places == sorted(places) and "training:" in printed
    for name in names:
        assert f"its output: {run}/stages/{name}.log" in printed
        assert (run / "stages" / f"{name}.log").stat().st_size > 0
    assert "[INFO]" in (run / "stages" / "train.log").read_text()
    assert again.count("was done before") == 5


def test_a_second_start_reuses_every_stage_and_keeps_the_first_run_s_times(
    twice: tuple[Path, list[dict[str, Any]], list[str]],
) -> None:
    _, (first, second), _ = twice
    assert first["reused"] == ["data"]  # the fixture had built the shards
    assert second["reused"] == ["data", "train", "evaluate", "convert", "generate"]
    same = (
        "wall_seconds",
        "train_tokens",
        "validation_loss",
        "bigram_loss",
        "sample",
        "tokens_per_second",
    )
    assert [first[field] for field in same] == [second[field] for field in same]


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.full)]
)
def test_ranks_save_and_end_when_the_main_job_is_ended_alone(
    tiny: Tiny, tmp_path: Path, number: signal.Signals
) -> None:
    run = tmp_path / "run"
    started = Started(quickstart(tiny, run, tokens=1_000_000), tiny.folder)
    wait_for_step(run, 2, started)
    started.process.send_signal(number)
    assert started.wait() != 0
    assert started.survivors() == []
    assert (run / "checkpoints" / "latest").is_file()
