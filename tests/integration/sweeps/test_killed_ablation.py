"""Ablations that are killed: what had finished is not redone, what was running resumes from its
checkpoint, and no run is at work twice at once.
"""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path

import pytest

from tests.support.sweep_runs import (
    ABLATIONS,
    SAME_NUMBERS,
    TwiceAtOnce,
    kill_everything,
    numbers,
    record,
    start,
    steps_of,
    wait_until_reached,
    wait_watching,
    write_axes,
)
from tests.support.tiny_run import STEP_TOKENS, Tiny

STEPS = 12


def finished_files(output: Path) -> dict[str, int]:
    """When each checkpoint of a finished run was written."""
    runs = [
        folder
        for folder in sorted((output / "runs").iterdir())
        if record(output, folder.name)["state"] == "finished"
    ]
    return {
        str(path): path.stat().st_mtime_ns
        for run in runs
        for path in run.glob("checkpoints/step_*/manifest.json")
    }


def test_killed_in_the_middle_and_started_again_at_once_a_run_goes_on_from_what_it_saved(
    tiny: Tiny, tmp_path: Path
) -> None:
    output, watch, run, steps = (
        tmp_path / "ablation",
        TwiceAtOnce(tmp_path / "ablation", 1),
        "hot_expert_factor=4",
        40,
    )
    axes = write_axes(tiny, tmp_path, {"logging.hot_expert_factor": [4.0]})
    settings = (
        "--set",
        "validation.interval_steps=20",
        "--tokens",
        str(steps * STEP_TOKENS),
        "--output",
        output,
    )
    killed = start(ABLATIONS, tmp_path, axes, "--mode", "grid", *settings)
    wait_until_reached(output, run, 1, killed, watch)
    rank = killed.rank(0)
    rank.suspend()  # the run must not end before its supervisor sees that the sweep is gone
    killed.process.kill()

    again = start(ABLATIONS, tmp_path, "--output", output, "--json", "-")
    time.sleep(1.0)
    rank.resume()
    assert wait_watching(again, watch) == 0, again.stderr
    assert killed.survivors() == [] and again.survivors() == []
    (row,) = json.loads(again.stdout)["points"]
    assert (row["point"], row["state"], row["attempts"]) == (run, "finished", 2)
    attempts = record(output, run)["attempts"]
    assert (
        "ended" not in attempts[0]
        and attempts[1]["exit_code"] == 0
        and 1 <= attempts[1]["resumed_from_step"] < steps
    )
    assert steps_of(output / "runs" / run) == list(range(1, steps + 1)) and watch.most == 1


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_six_runs_of_two_ranks_killed_twice_finish_with_six_results_and_none_done_twice(
    tiny: Tiny, tmp_path: Path
) -> None:
    output, watch = tmp_path / "ablation", TwiceAtOnce(tmp_path / "ablation", 2)
    experts = {str(count): {"model.moe.num_experts": count} for count in (2, 4, 8)}
    axes = write_axes(tiny, tmp_path, {"experts": experts, **SAME_NUMBERS})
    settings = ("--set", "parallel.ep_size=2", "--set", "checkpoint.interval_steps=3")
    arguments = (
        axes,
        "--mode",
        "grid",
        *settings,
        "--ranks",
        "2",
        "--slots",
        "2",
        "--tokens",
        str(STEPS * STEP_TOKENS),
        "--output",
        output,
    )
    names = [
        f"experts={count},hot_expert_factor={factor}" for count in (2, 4, 8) for factor in (5, 4)
    ]

    killed = start(ABLATIONS, tmp_path, *arguments)
    wait_until_reached(output, names[0], 4, killed, watch)
    killed.process.kill()  # the runs notice, save and end; the next start waits for that

    lost_power = start(ABLATIONS, tmp_path, *arguments)
    wait_until_reached(output, names[3], 4, lost_power, watch)
    before = finished_files(output)
    assert before, "a run has finished before the second kill"
    kill_everything(lost_power)

    last = start(ABLATIONS, tmp_path, *arguments, "--json", "-")
    assert wait_watching(last, watch) == 0, last.stderr
    result = json.loads(last.stdout)
    assert (
        result["states"] == {"finished": 6} and [row["point"] for row in result["points"]] == names
    )
    assert before.items() <= finished_files(output).items()
    attempts = {name: record(output, name)["attempts"] for name in names}
    assert len(attempts[names[0]]) >= 2 and len(attempts[names[3]]) >= 2
    # The first kill let it save its step 4 or later; the second one left the checkpoint of step 3
    # or later.
    assert (
        attempts[names[0]][1]["resumed_from_step"] >= 4
        and attempts[names[3]][-1]["resumed_from_step"] >= 3
    )
    for name in names:
        assert [attempt.get("exit_code") for attempt in attempts[name]].count(0) == 1, name
        assert steps_of(output / "runs" / name) == list(range(1, STEPS + 1))
    for interrupted, other in ((names[0], names[1]), (names[3], names[2]), (names[4], names[5])):
        assert numbers(output / "runs" / interrupted) == numbers(output / "runs" / other)
    assert numbers(output / "runs" / names[0]) != numbers(output / "runs" / names[2])
    with (output / "ablation_results.csv").open() as file:
        assert [row["point"] for row in csv.DictReader(file)] == names
    assert watch.most == 2 and all(
        started.survivors() == [] for started in (killed, lost_power, last)
    )
