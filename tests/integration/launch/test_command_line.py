"""What the training command does besides training: it resumes, refuses, plans and prints JSON."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pretrain.callbacks import evaluation
from pretrain.callbacks.base import Summary
from pretrain.callbacks.evaluation import ContinuousEvaluation
from pretrain.core.errors import ConfigError
from pretrain.core.files import only_writer
from pretrain.train import main
from tests.support.paths import LAUNCHERS
from tests.support.tiny_run import Started, Tiny, curve


@pytest.fixture
def finished(reference: Path, tmp_path: Path) -> Path:
    """A run of five steps that is done."""
    return Path(shutil.copytree(reference, tmp_path / "run"))


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Time of the last change and size of every file, but the log."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "log.txt"]
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, path.stat().st_size)
        for path in files
    }


def test_the_same_command_says_that_it_is_done_and_rewrites_nothing(
    tiny: Tiny, finished: Path, in_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(finished)
    assert main(tiny.arguments(finished)) == 0
    assert "done already" in capsys.readouterr().out
    assert main([*tiny.arguments(finished), "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 5
    assert before.items() <= contents(finished).items()


def test_a_run_that_is_killed_at_its_end_has_its_summary_and_makes_up_for_the_rest(
    tiny: Tiny,
    finished: Path,
    in_process: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Killed(BaseException): ...

    def kill(self: ContinuousEvaluation, summary: Summary) -> None:
        raise Killed

    (tool := finished / "tool.py").write_text("print('evaluated')")
    monkeypatch.setattr(evaluation, "TOOL", tool)
    for name in (kept := ("README.md", "training_curves.png", "summary.json")):
        (finished / name).unlink()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(
            ContinuousEvaluation, "on_end", kill
        )  # while it waits for the evaluation of the last checkpoint
        main(tiny.arguments(finished, "evaluation={}"))
    assert all((finished / name).is_file() for name in kept) and "ended_at_step" not in json.loads(
        (finished / "summary.json").read_text()
    )
    assert main(tiny.arguments(finished, "evaluation={}")) == 0
    assert (
        "done already" in capsys.readouterr().out
        and "evaluated" in (finished / "evaluation.log").read_text()
    )
    before = contents(finished)
    assert json.loads((finished / "summary.json").read_text())["ended_at_step"] == 5
    assert main(tiny.arguments(finished, "evaluation={}")) == 0
    assert before.items() <= contents(finished).items()


def test_more_tokens_continue_a_finished_run(
    tiny: Tiny,
    finished: Path,
    reference: Path,
    in_process: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(tiny.arguments(finished, steps=7)) == 0
    assert "resuming from step 5 of 7" in capsys.readouterr().out
    rows, before = curve(finished), curve(reference)
    assert rows[: len(before)] == before
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2, 3, 4, 5, 6, 7]


def test_fresh_deletes_a_run_only_with_overwrite(
    tiny: Tiny, finished: Path, reference: Path, in_process: None
) -> None:
    (finished / "notes.txt").write_text("mine")
    (finished / "usage").mkdir()
    (finished / "usage" / "step_000005.npz").touch()
    before = contents(finished)
    with pytest.raises(
        ConfigError, match="--fresh would delete a run .*step_5.* add --overwrite"
    ) as refused:
        main([*tiny.arguments(finished), "--fresh"])
    assert refused.value.exit_code == 2
    assert before.items() <= contents(finished).items()
    assert main([*tiny.arguments(finished), "--fresh", "--overwrite"]) == 0
    assert curve(finished) == curve(reference)
    assert (finished / "notes.txt").read_text() == "mine" and not (finished / "usage").exists()
    assert (
        contents(finished)["checkpoints/step_5/manifest.json"]
        != before["checkpoints/step_5/manifest.json"]
    )


def test_dry_run_prints_parameters_and_touches_nothing(
    tiny: Tiny, tmp_path: Path, in_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main([*tiny.arguments(run), "--dry-run", "--world-size", "4"]) == 0
    assert "parameters" in capsys.readouterr().out
    assert main([*tiny.arguments(run), "--dry-run", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)
    assert list(tmp_path.iterdir()) == []


def test_json_alone_on_standard_output_from_any_folder_with_the_default_ds_config(
    one_process: tuple[Path, Started],
) -> None:
    run, started = one_process
    assert json.loads(started.stdout)["steps"] == 5
    assert "training" in started.stderr
    assert (run / "checkpoints" / "latest").read_text() == "step_5\n"


def test_a_second_run_on_the_same_folder_is_refused_through_the_launcher_with_one_sentence(
    tiny: Tiny, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with only_writer(run, "wait"):
        started = Started(
            [LAUNCHERS / "run_torchrun.sh", *tiny.arguments(run, "parallel.ep_size=2")], tmp_path
        )
        assert started.wait() == 2, started.stderr
    errors = [line for line in started.stderr.splitlines() if line.startswith("error:")]
    assert errors == [
        f"error: another process is writing to {run}: wait for it to end, or choose another folder"
        " with --set run_path=FOLDER"
    ]
    assert "Traceback" not in started.stdout + started.stderr
    assert started.survivors() == []
