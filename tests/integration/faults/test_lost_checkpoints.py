"""A run whose checkpoints are gone or damaged does not begin anew in silence."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.checkpoint.layout import SAVED
from tests.support.path_payloads import FILES, MANIFESTS, STATES
from tests.support.tiny_run import SCRIPT, Started, Tiny, curve, wait_for_step

Command = Callable[[list[str]], tuple[int, str]]


@pytest.fixture
def run(six_steps: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(six_steps, tmp_path / "run"))


def steps_gone(run: Path) -> None:
    for folder in (run / "checkpoints").glob("step_*"):
        shutil.rmtree(folder)


def pointers_gone(run: Path) -> None:
    steps_gone(run)
    (run / "checkpoints" / "latest").unlink()


def all_gone(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")


def only_the_mark_is_left(run: Path) -> None:
    all_gone(run)
    (run / "summary.json").unlink()


def only_the_summary_is_left(run: Path) -> None:
    all_gone(run)
    (run / SAVED).unlink()


@pytest.mark.parametrize(
    "loss", [steps_gone, pointers_gone, all_gone, only_the_mark_is_left, only_the_summary_is_left]
)
def test_a_run_whose_checkpoints_are_gone_is_refused_and_keeps_its_metrics(
    loss: Callable[[Path], None], run: Path, tiny: Tiny, train: Command
) -> None:
    loss(run)
    metrics = (run / "metrics.jsonl").read_bytes()
    code, message = train(tiny.arguments(run, steps=6))
    assert code == 2 and "--fresh" in message and str(run) in message
    assert message.count("error: ") == 1 and "Traceback" not in message
    assert (run / "metrics.jsonl").read_bytes() == metrics


def test_fresh_forgets_that_there_were_checkpoints(run: Path, tiny: Tiny, train: Command) -> None:
    all_gone(run)
    assert train([*tiny.arguments(run, steps=3), "--fresh", "--overwrite"])[0] == 0
    assert (run / "checkpoints" / "latest").read_text() == "step_3\n" and (run / SAVED).is_file()


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(
    run: Path, tiny: Tiny, train: Command, tmp_path: Path
) -> None:
    first = tmp_path / "first"
    arguments = tiny.arguments(first, "checkpoint.interval_steps=1000", steps=400)
    started = Started([sys.executable, SCRIPT, *arguments], tmp_path)
    wait_for_step(first, 2, started)
    os.kill(started.process.pid, signal.SIGKILL)
    started.wait()
    assert len((first / "metrics.jsonl").read_text().splitlines()) >= 2
    assert not list((first / "checkpoints").glob("step_*"))
    assert train(tiny.arguments(first, steps=3))[0] == 0
    assert [row["step"] for row in curve(first) if row["kind"] == "train"] == [1, 2, 3]


def test_what_should_be_a_pointer_and_is_none_is_named(
    run: Path, tiny: Tiny, train: Command
) -> None:
    latest = run / "checkpoints" / "latest"
    for make in (latest.mkdir, lambda: os.mkfifo(latest), lambda: latest.symlink_to("nowhere")):
        latest.rmdir() if latest.is_dir() else latest.unlink(missing_ok=True)
        make()
        code, message = train(tiny.arguments(run, steps=7))
        assert code == 4 and str(latest) in message and "Traceback" not in message


def test_a_pointer_to_a_step_that_is_gone_is_said(run: Path, tiny: Tiny, train: Command) -> None:
    (run / "checkpoints" / "latest").write_text("step_9\n")
    code, message = train(tiny.arguments(run, steps=6))
    assert code == 0 and "names step_9, which is gone" in message and "step_6" in message


def test_a_step_without_a_manifest_is_passed_over_and_said(
    run: Path, tiny: Tiny, train: Command, six_steps: Path
) -> None:
    (run / "checkpoints" / "step_6" / "manifest.json").unlink()
    code, message = train(tiny.arguments(run, steps=6))
    assert code == 0 and "step_6 has no manifest.json" in message
    assert curve(run) == curve(six_steps)


CHANGES = {
    **{name: MANIFESTS[name] for name in ("no files", "100,000 lists", "a size as text")},
    **{name: FILES[name] for name in ("a file that is not listed", "a link to a file outside")},
    **{name: STATES[name] for name in ("step as text", "progress of null")},
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_older_checkpoint_is_used_and_the_fault_is_named(
    change: str, run: Path, tiny: Tiny, train: Command, six_steps: Path
) -> None:
    CHANGES[change](run / "checkpoints" / "step_6")
    assert train(tiny.arguments(run, steps=6))[0] == 0
    warning = next(
        line for line in (run / "log.txt").read_text().splitlines() if "fell back to" in line
    )
    assert "step_3" in warning and any(
        word in warning for word in ("manifest.json", "state.json", "recipe.yaml")
    )
    assert curve(run) == curve(six_steps)
    assert json.loads((run / "summary.json").read_text())["steps"] == 6
