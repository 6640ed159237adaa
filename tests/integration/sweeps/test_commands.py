"""The two commands from their options: what they print, refuse and write; and whole real sweeps of
them.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain.core.errors import ConfigError, run_command
from pretrain.sweeps import launch
from tests.support.paths import LAUNCHERS, WORKERS
from tests.support.sweep_runs import (
    ABLATIONS,
    SWEEP,
    TwiceAtOnce,
    numbers,
    record,
    start,
    steps_of,
    wait_until_reached,
    wait_watching,
    write_axes,
)
from tests.support.tiny_run import STEP_TOKENS, Started, Tiny, own_process
from tools import run_ablations, sweep

RATE = "optimizer.learning_rate"
KEY = "0123456789abcdef0123456789abcdef01234567"  # in the form of a tracker's
Command = Callable[..., int]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Command:
    def call(tool: Any, *arguments: str | Path) -> int:
        monkeypatch.setattr(sys, "argv", [tool.__file__, *map(str, arguments)])
        code: int = tool.main()
        return code

    return call


def test_a_dry_run_lists_the_points_and_writes_nothing(
    tiny: Tiny, tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    axes = ("--axis", f"{RATE}=log:1e-3:1e-2:2", "--seeds", "1", "2")
    assert (
        command(
            sweep,
            "--recipe",
            tiny.recipe,
            *axes,
            "--output",
            tmp_path / "sweep",
            "--dry-run",
            "--json",
            "-",
        )
        == 0
    )
    points = json.loads(capsys.readouterr().out)["points"]
    assert [(point["name"], point["overrides"]) for point in points] == [
        (f"learning_rate={rate},seed={seed}", [f"{RATE}={rate}", f"seed={seed}"])
        for rate in ("0.001", "0.01")
        for seed in (1, 2)
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "tool,arguments,told",
    [
        (sweep, ("--recipe", "debug"), "needs a recipe and at least one axis"),
        (sweep, (), "holds no sweep to resume"),
        (
            sweep,
            ("--recipe", "TINY", "--axis", "seed=[1]", "--slots", "0"),
            "--slots 0 must be at least 1",
        ),
        (sweep, ("--recipe", "TINY", "--axis", "model.moe.top_k=[9]"), "1 of 1 points cannot run"),
        (sweep, ("--recipe", "nothing", "--axis", "seed=[1]"), "there is no recipe 'nothing'"),
        (
            sweep,
            ("--recipe", "TINY", "--axis", "model.moe.topk=[1,2]", "--search", "tpe"),
            "none of the first 50 points .* unknown field",
        ),
        (
            sweep,
            (
                "--recipe",
                "TINY",
                "--axis",
                "seed=[1,2]",
                "--search",
                "tpe",
                "--set",
                f"trackers.group={KEY}",
            ),
            "looks like a credential",
        ),
        (
            sweep,
            ("--recipe", "TINY", "--axis", f"trackers.group=[{KEY},b]", "--skip-invalid"),
            "axis trackers.group: .* like a credential",
        ),
        (run_ablations, ("AXES", "--axes", "width"), "has no axis 'width': it has seed"),
        (run_ablations, ("--axes", "width"), "needs a file of axes"),
        (
            run_ablations,
            ("AXES", "--ds_config", "absent.json"),
            "cannot read the ds_config absent.json",
        ),
    ],
)
def test_what_cannot_be_is_told_and_writes_nothing(
    tiny: Tiny, tmp_path: Path, command: Command, tool: Any, arguments: tuple[str, ...], told: str
) -> None:
    axes = write_axes(tiny, tmp_path, {"seed": [1, 2]})
    given = [
        str(tiny.recipe) if word == "TINY" else str(axes) if word == "AXES" else word
        for word in arguments
    ]
    with pytest.raises(ConfigError, match=told):
        command(tool, *given, "--output", tmp_path / "sweep")
    assert list(tmp_path.iterdir()) == [axes]


def test_an_array_script_has_a_task_a_run_and_the_folder_goes_on_by_itself(
    tiny: Tiny, tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    axes, output = (
        write_axes(tiny, tmp_path, {"seed": [1, 2, 3], "logging.interval_steps": [1, 2]}),
        tmp_path / "sweep",
    )
    assert command(run_ablations, axes, "--output", output, "--slurm", "--slots", "2") == 0
    script = (output / "array.sbatch").read_text()
    assert "#SBATCH --array=0-4%2" in script  # six points, of which one is the base recipe itself
    assert subprocess.run(["bash", "-n", output / "array.sbatch"], check=False).returncode == 0
    assert not (output / "runs").exists() and "5 runs" in capsys.readouterr().out
    assert command(run_ablations, "--output", output, "--report", "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["states"] == {"waiting": 5}
    with pytest.raises(ConfigError, match="another 'axes'"):
        command(run_ablations, axes, "--axes", "seed", "--output", output)
    for given in (
        ("--tokens", "999"),
        ("--seeds", "1"),
        ("--set", "seed=1"),
        ("--ds-config", "absent"),
        ("--mode", "each"),
        ("--skip-invalid",),
    ):
        with pytest.raises(ConfigError, match=f"{given[0]} defines a sweep"):
            command(run_ablations, "--output", output, *given)
    for given in (
        ("--search", "tpe"),
        ("--trials", "16"),
        ("--search-seed", "0"),
        ("--prune",),
        ("--ranks", "1"),
    ):
        with pytest.raises(ConfigError, match=f"{given[0]} defines a sweep"):
            command(sweep, "--output", output, *given)
    with pytest.raises(ConfigError, match="--slots 0 must be"):
        command(run_ablations, "--output", output, "--slots", "0")
    with pytest.raises(ConfigError, match="has runs 0 to 4"):
        command(run_ablations, "--output", output, "--point", "5")
    searched = (
        "--recipe",
        tiny.recipe,
        "--axis",
        f"{RATE}=log:1e-4:1e-2",
        "--search",
        "tpe",
        "--output",
        tmp_path / "tpe",
        "--slurm",
    )
    with pytest.raises(ConfigError, match="cannot be an array of jobs"):
        command(sweep, *searched)


def test_a_tpe_search_runs_its_trials_and_more_once_retries_what_failed_and_is_done(
    tiny: Tiny,
    tmp_path: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "launchers").mkdir()
    shutil.copy(LAUNCHERS / "supervise.py", tmp_path / "launchers")
    shutil.copy(WORKERS / "simulated_training.py", tmp_path / "launchers" / "pretrain.py")
    monkeypatch.setattr(launch, "LAUNCHERS", tmp_path / "launchers")
    axes, output = (
        ("--axis", f"{RATE}=log:1e-4:1e-1", "--axis", "model.moe.top_k=[1,2]"),
        tmp_path / "sweep",
    )
    asked = (
        "--recipe",
        tiny.recipe,
        *axes,
        "--search",
        "tpe",
        "--output",
        output,
        "--json",
        "-",
        "--trials",
    )

    def result(code: int, *arguments: str | Path) -> dict[str, Any]:
        with own_process():
            assert command(sweep, *arguments) == code
        content: dict[str, Any] = json.loads(capsys.readouterr().out)
        return content

    assert result(0, *asked, "4")["states"] == {"finished": 4}
    path, failed = output / "points" / "trial_0003" / "record.json", record(output, "trial_0003")
    path.write_text(
        json.dumps(failed | {"state": "failed", "result": None, "attempts": [{"exit_code": 3}]})
    )
    (path.parent / "result.json").unlink()
    first = result(0, *asked, "5", "--retry-failed")
    assert first["states"] == {"finished": 5} and first == result(
        0, "--output", output, "--json", "-"
    )
    assert [len(record(output, f"trial_000{number}")["attempts"]) for number in range(5)] == [
        1,
        1,
        1,
        2,
        1,
    ]
    best = first["ranking"][0]
    assert best["validation_loss"] == min(
        row["validation_loss"] for row in first["points"]
    ) and set(best["values"]) == {RATE, "model.moe.top_k"}
    assert (
        all(Path(path).is_file() for path in first["files"].values()) and len(first["files"]) == 5
    )
    assert [path.name for path in sorted((output / "runs").iterdir())] == [
        f"trial_000{number}" for number in range(5)
    ]


@pytest.mark.parametrize("tool", [sweep, run_ablations])
def test_help_has_examples_and_exit_codes(
    tool: Any, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: command(tool, "--help"))
    shown = capsys.readouterr().out
    assert (
        ended.value.code == 0
        and "examples:" in shown
        and "75 interrupted and saved" in shown
        and "--json" in shown
    )


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_a_real_grid_over_seeds_stopped_by_ctrl_c_goes_on_and_tells_which_rate_diverged(
    tiny: Tiny, tmp_path: Path
) -> None:
    output = tmp_path / "sweep"
    watch = TwiceAtOnce(output, 1)
    settings = (
        "--set",
        "train.grad_clip=0",
        "--set",
        "optimizer.kind=sgd",
        "--tokens",
        str(10 * STEP_TOKENS),
        "--output",
        output,
    )
    arguments = (
        "--recipe",
        tiny.recipe,
        "--axis",
        f"{RATE}=[0.03, 1.0e+18]",
        "--seeds",
        "1",
        "2",
        *settings,
    )
    names = [f"learning_rate={rate},seed={seed}" for rate in ("0.03", "1e+18") for seed in (1, 2)]
    stopped = start(SWEEP, tmp_path, *arguments)
    wait_until_reached(output, names[0], 3, stopped, watch)
    stopped.process.send_signal(signal.SIGINT)
    assert stopped.wait() == 75, stopped.stderr
    assert (
        f"python tools/sweep.py --output {output} continues" in stopped.stdout
        and stopped.survivors() == []
    )
    assert (
        record(output, names[0])["state"] == "interrupted"
        and record(output, names[0])["attempts"][0]["exit_code"] == 75
    )
    assert record(output, names[1])["state"] == "waiting"

    again = start(SWEEP, tmp_path, *arguments, "--json", "-")
    assert wait_watching(again, watch) == 6, again.stderr
    result = json.loads(again.stdout)
    assert result["states"] == {"finished": 2, "failed": 2}
    assert (
        "not finite" in record(output, names[2])["error"]
        and record(output, names[2])["attempts"][0]["exit_code"] == 6
    )
    (entry,) = result["ranking"]
    assert (entry["point"], entry["seeds"]) == ("learning_rate=0.03", 2) and entry["spread"] > 0
    assert steps_of(output / "runs" / names[0]) == list(range(1, 11))
    assert [len(record(output, name)["attempts"]) for name in names] == [2, 1, 1, 1]


@pytest.mark.full
def test_a_real_tpe_search_whose_runs_stop_early_finishes_and_gets_more_trials(
    tiny: Tiny, tmp_path: Path
) -> None:
    output, names = tmp_path / "sweep", [f"trial_000{number}" for number in range(4)]
    settings = (
        "--set",
        "guards.early_stopping={patience: 1, min_delta: 10.0}",
        "--tokens",
        str(10 * STEP_TOKENS),
        "--output",
        output,
    )
    axes = ("--axis", f"{RATE}=log:1e-4:1e-1", "--axis", "model.moe.top_k=[1, 2, 8]")
    arguments = (
        "--recipe",
        tiny.recipe,
        *axes,
        *settings,
        "--search",
        "tpe",
        "--json",
        "-",
        "--trials",
    )
    first = start(SWEEP, tmp_path, *arguments, "3")
    assert first.wait() == 0, first.stderr
    before = {name: record(output, name) for name in names[:3]}
    more = start(SWEEP, tmp_path, *arguments, "4")
    assert more.wait() == 0, more.stderr
    result = json.loads(more.stdout)
    assert result["states"]["finished"] == 4 and len(result["ranking"]) == 4
    assert [row["steps"] for row in result["points"] if row["state"] == "finished"] == [4] * 4
    assert {name: record(output, name) for name in names[:3]} == before


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_tasks_of_an_array_run_through_bash_and_are_put_back_into_the_queue_when_they_are_preempted(
    tiny: Tiny, tmp_path: Path
) -> None:
    output, watch = tmp_path / "ablation", TwiceAtOnce(tmp_path / "ablation", 1)
    axes = write_axes(tiny, tmp_path, {"logging.hot_expert_factor": [5.0, 4.0]})
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "scontrol").write_text('#!/usr/bin/env bash\necho "$@" >> scontrol.txt\n')
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    asked = ("--mode", "grid", "--tokens", str(12 * STEP_TOKENS), "--output", output, "--slurm")
    written = start(ABLATIONS, tmp_path, axes, *asked)
    assert written.wait() == 0, written.stderr

    def task(number: int) -> Started:
        path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:/usr/bin:/bin"
        return Started(
            ["bash", output / "array.sbatch"],
            tmp_path,
            {
                "SLURM_ARRAY_TASK_ID": str(number),
                "SLURM_ARRAY_JOB_ID": "42",
                "SLURM_JOB_ID": "43",
                "PATH": path,
            },
        )

    names = [f"hot_expert_factor={factor}" for factor in (5, 4)]
    preempted, other = task(0), task(1)
    wait_until_reached(output, names[0], 3, preempted, watch)
    preempted.process.send_signal(signal.SIGTERM)
    assert preempted.wait() == 75, preempted.stderr
    assert (tmp_path / "scontrol.txt").read_text() == "requeue 42_0\n"
    assert other.wait() == 0, other.stderr
    again = task(0)
    assert wait_watching(again, watch) == 0, again.stderr
    assert (tmp_path / "scontrol.txt").read_text() == "requeue 42_0\n"
    assert numbers(output / "runs" / names[0]) == numbers(output / "runs" / names[1])
    reported = start(ABLATIONS, tmp_path, "--output", output, "--json", "-")
    assert reported.wait() == 0, reported.stderr
    assert (
        json.loads(reported.stdout)["states"] == {"finished": 2}
        and (output / "ablation_results.csv").is_file()
    )
    assert [len(record(output, name)["attempts"]) for name in names] == [2, 1]
