"""Checkpoints of a real run are evaluated beside the training, by the recipe's section."""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from pathlib import Path

import psutil
import pytest

from pretrain.callbacks import evaluation
from pretrain.callbacks.evaluation import ContinuousEvaluation, watch_command
from pretrain.config.recipe import CodeEvaluation, EvaluationConfig
from pretrain.core.errors import ConfigError, DataError
from pretrain.train import main
from tests.support.tiny_run import SCRIPT, Started, make_tiny


@pytest.mark.full
def test_each_checkpoint_of_a_run_is_evaluated_as_the_recipe_says(tmp_path: Path) -> None:
    tiny, run = make_tiny(tmp_path), tmp_path / "run"
    section = (
        "evaluation={interval_steps: 4, max_windows: 8, prompts: ['the router', '-x'],"
        " max_new_tokens: 4}"
    )
    overrides = (section, "checkpoint.interval_steps=2", "checkpoint.keep_last=9")
    started = Started([sys.executable, SCRIPT, *tiny.arguments(run, *overrides, steps=5)], tmp_path)
    assert started.wait() == 0, started.stderr
    assert started.survivors() == []
    rows = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [4, 5], (run / "evaluation.log").read_text()
    assert rows[0]["loss"] != rows[1]["loss"] and rows[1]["by_source/all/loss"] == pytest.approx(
        rows[1]["loss"]
    )
    assert [text["prompt"] for text in rows[1]["texts"]] == ["the router", "-x"]
    assert any((run / "tensorboard" / "evaluation").glob("events.out.tfevents.*"))
    validation = [
        json.loads(line)
        for line in (run / "metrics.jsonl").read_text().splitlines()
        if '"validation"' in line
    ]
    assert next(row for row in validation if row["step"] == 4)["validation_loss"] == pytest.approx(
        rows[0]["loss"], abs=1e-4
    )


def write_problems(path: Path) -> None:
    """A problem that whatever text solves, inside of quotes, and one that nothing solves."""
    solved = {"task_id": "T/0", "prompt": "x = r'''", "test": "'''\nassert x is not None"}
    never = {"task_id": "T/1", "prompt": "x = 1\n", "test": "assert False"}
    path.write_text("".join(json.dumps(problem) + "\n" for problem in (solved, never)))


def test_programs_that_each_checkpoint_writes_are_run_if_the_recipe_allows_it(
    tmp_path: Path,
) -> None:
    tiny, run, problems = make_tiny(tmp_path), tmp_path / "run", tmp_path / "problems.jsonl"
    settings = (
        "model.num_hidden_layers=1",
        "checkpoint.interval_steps=2",
        "evaluation.heldout=false",
        f"evaluation.code={{problems: {problems}, num_samples: 2, pass_at: [1, 2], temperature: 1.0,"
        " max_new_tokens: 4, program_seconds: 20}",
    )
    allowed = "evaluation.code.allow_execution=true"
    arguments = tiny.arguments(run, *settings, steps=2)
    with pytest.raises(ConfigError, match="allow it with --set evaluation.code.allow_execution"):
        main(arguments)
    with pytest.raises(DataError, match=r"problems\.jsonl"):
        main([*arguments, "--set", allowed])
    assert not (run / "evaluations.jsonl").exists()

    write_problems(problems)
    started = Started([sys.executable, SCRIPT, *arguments, "--set", allowed], tmp_path)
    assert started.wait() == 0, started.stderr
    (row,) = (json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines())
    assert row["step"] == 2 and (row["code/pass_at/1"], row["code/pass_at/2"]) == (0.5, 0.5)
    assert (row["code/passed/T/0"], row["code/passed/T/1"]) == (2, 0)


def test_code_needs_samples_enough_and_chance() -> None:
    with pytest.raises(ValueError, match="pass@5 needs 5 samples"):
        CodeEvaluation(problems="p", pass_at=[1, 5], num_samples=4, temperature=0.8)
    with pytest.raises(ValueError, match="several samples of a problem need a temperature"):
        CodeEvaluation(problems="p", num_samples=4)


def started_callback(
    folder: Path, monkeypatch: pytest.MonkeyPatch, body: str
) -> ContinuousEvaluation:
    """The callback with another program in the tool's place."""
    tool = folder / "tool.py"
    tool.write_text(body)
    monkeypatch.setattr(evaluation, "TOOL", tool)
    callback = ContinuousEvaluation(folder, EvaluationConfig(finish_seconds=30))
    callback.on_start(0, 3)
    assert callback.process is not None
    return callback


def test_an_interrupted_training_does_not_wait_and_a_finished_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    callback = started_callback(tmp_path, monkeypatch, "import time; time.sleep(300)")
    callback.on_step(2)
    started = time.monotonic()
    callback.on_end({})
    assert time.monotonic() - started < 10 and not psutil.pid_exists(callback.process.pid)
    callback = started_callback(
        tmp_path, monkeypatch, "import sys, time; time.sleep(0.5); print(sys.argv)"
    )
    callback.on_step(3)
    callback.on_end({})
    assert (
        callback.process.returncode == 0 and "--watch" in (tmp_path / "evaluation.log").read_text()
    )


def test_an_evaluation_that_fails_is_reported_once_and_while_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = started_callback(tmp_path, monkeypatch, "import sys; sys.exit(2)")
    callback.process.wait(30)
    for step in (1, 2):
        callback.on_record({"kind": "train", "step": step})
    callback.on_step(3)
    callback.on_end({})
    said = capsys.readouterr().err
    assert said.count("the evaluation of checkpoints ended with exit code 2: see ") == 1


def test_a_run_that_goes_back_forgets_evaluations_and_is_watched_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    callback = started_callback(tmp_path, monkeypatch, "import time; time.sleep(300)")
    first = callback.process
    (tmp_path / "evaluations.jsonl").write_text(
        "".join(json.dumps({"step": step}) + "\n" for step in (1, 2))
    )
    callback.on_rollback(1)
    assert first.returncode is not None and callback.process.pid != first.pid
    assert [
        json.loads(line)["step"]
        for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()
    ] == [1]
    callback.on_end({})
    assert not psutil.pid_exists(callback.process.pid)


def test_the_watching_process_is_no_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_RANK", "KEPT"):
        monkeypatch.setenv(name, "1")
    callback = started_callback(tmp_path, monkeypatch, "import os; print(sorted(os.environ))")
    callback.on_step(3)
    callback.on_end({})
    log = (tmp_path / "evaluation.log").read_text()
    assert "'KEPT'" in log and not any(
        f"'{name}'" in log for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_RANK")
    )


def test_every_option_of_the_section_reaches_the_command(tmp_path: Path) -> None:
    config = EvaluationConfig(
        interval_steps=20,
        heldout=True,
        max_windows=3,
        prompts=["a b"],
        tasks=["x", "y"],
        include_path="t",
        limit=5,
        device="cuda:1",
        code=CodeEvaluation(problems="h", allow_execution=True, num_samples=4, temperature=0.8),
    )
    command = watch_command(tmp_path, config, 20, 100)
    for part in ("--heldout", "--prompt=a b", "x,y", "--allow-code-execution"):
        assert part in command
    assert command[command.index("--parent") :][:4] == ["--parent", str(os.getpid()), "20", "100"]
    pairs = set(itertools.pairwise(command))
    expected = {
        ("--interval-steps", "20"),
        ("--max-windows", "3"),
        ("--tasks", "x,y"),
        ("--include-path", "t"),
        ("--limit", "5"),
        ("--device", "cuda:1"),
        ("--code-problems", "h"),
        ("--num-samples", "4"),
        ("--pass-at", "1"),
        ("--code-temperature", "0.8"),
        ("--code-max-new-tokens", "256"),
        ("--program-seconds", "10.0"),
        ("--program-memory", "1024"),
    }
    assert expected <= pairs
