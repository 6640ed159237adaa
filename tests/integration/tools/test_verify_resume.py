"""tools/verify_resume.py on a real run: killed on two ranks, and continued on one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoint.ledger import LEDGER
from pretrain.engine.topology import free_port
from tests.support.tiny_run import SCRIPT, Started, Tiny, wait_for_step
from tests.support.tool_runs import run_here

TOOL = "verify_resume.py"
TORCHRUN = Path(sys.executable).parent / "torchrun"


@pytest.fixture(scope="module")
def run(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Killed after step 4 on two ranks with ep_size 2, continued to step 7 on one with ZeRO 2."""
    folder = tmp_path_factory.mktemp("moved")
    run = folder / "run"
    launcher = [TORCHRUN, "--nproc_per_node", "2", "--master_port"]
    steps = ["--set", "checkpoint.background=false"]
    started = Started(
        [
            *[*launcher, str(free_port()), SCRIPT],
            *tiny.arguments(run, "parallel.ep_size=2", steps=4000, zero=1),
            *steps,
        ],
        folder,
    )
    wait_for_step(run, 4, started)
    for process in started.alive():
        process.send_signal(signal.SIGKILL)
    started.wait()
    done = sorted((run / "checkpoints").glob("step_*"), key=lambda path: path.stat().st_mtime)
    step = int(done[-1].name.removeprefix("step_"))
    continued = Started(
        [sys.executable, SCRIPT, *tiny.arguments(run, steps=step + 2, zero=2), *steps], folder
    )
    assert continued.wait() == 0, continued.stderr
    return run


def content(run: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()
    }


def proof(run: Path, *options: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, JSON and standard error of a check on two ranks with ep_size 2 and ZeRO 1."""
    sides = ["--world-size", "2", "--ep-size", "2", "--zero", "1"]
    done = run_here(TOOL, run / "checkpoints" / "latest", *sides, "--json", "-", *options)
    return done.returncode, json.loads(done.stdout), done.stderr


def test_a_checkpoint_resumes_elsewhere_and_its_run_is_untouched(run: Path) -> None:
    before = content(run)
    code, found, errors = proof(run, "--steps", "2")
    assert (code, errors) == (0, "")
    assert found["resumes"] and found["tensors"] > 20
    assert (found["reference"]["world_size"], found["asked"]["world_size"]) == (1, 2)
    assert found["reference"]["data"] == found["asked"]["data"]
    assert len(found["steps"]) == 2
    for step in found["steps"]:
        assert step["loss_distance"] <= 1e-5 and step["grad_norm_distance"] <= 1e-5
        assert step["loss"][0] > 1
    assert content(run) == before


def test_a_checkpoint_resumes_on_ranks_that_share_sequences(run: Path) -> None:
    code, found, errors = proof(run, "--steps", "2", "--sp-size", "2")
    assert (code, errors) == (0, "")
    assert (found["reference"]["sp_size"], found["asked"]["sp_size"]) == (1, 2)
    assert len(found["steps"]) == 2
    for step in found["steps"]:
        assert step["loss_distance"] <= 1e-5 and step["grad_norm_distance"] <= 1e-5


def test_one_wrong_tensor_is_found_and_named(run: Path) -> None:
    code, found, errors = proof(
        run, "--steps", "0", "--plugin", "tests.support.other_weights", "--random-tokens"
    )
    assert code == 4 and not found["resumes"]
    assert found["reference"]["differing_tensors"] == []
    assert found["asked"]["differing_tensors"] != []
    assert found["asked"]["differing_tensors"][0] in errors


def test_a_run_over_a_kill_and_a_move_is_one_trace(run: Path, tmp_path: Path) -> None:
    done = run_here(TOOL, "--ledger", run)
    assert done.returncode == 0, done.stderr
    first, second, *_ = done.stdout.splitlines()
    assert first.startswith("segment 1: steps 0 to ") and "2 ranks, ep_size 2, ZeRO 1" in first
    assert second.startswith("segment 2: steps ") and "1 ranks, ep_size 1, ZeRO 2" in second
    assert "one certified trace of 2 segments" in done.stdout
    # Swapped: the newest checkpoint's files under an older one's name, and one edited digit.
    swapped = tmp_path / "run"
    shutil.copytree(run, swapped)
    older, newer = sorted((swapped / "checkpoints").glob("step_*"), key=lambda path: path.name)[-2:]
    shutil.rmtree(older)
    shutil.copytree(newer, older)
    done = run_here(TOOL, "--ledger", swapped)
    assert done.returncode == 4 and f"{older.name} is another checkpoint" in done.stderr
    records = (run / LEDGER).read_text()
    (swapped / LEDGER).write_text(records.replace('"world_size": 2', '"world_size": 4', 1))
    done = run_here(TOOL, "--ledger", swapped)
    assert done.returncode == 4 and "record 0 was edited" in done.stderr


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "give a checkpoint, or --ledger RUN"),
        (["RUN/checkpoints/latest", "--ledger", "RUN"], "not both"),
        (["RUN/checkpoints/latest", "--world-size", "0"], "--world-size is 0"),
        (["RUN/checkpoints/latest", "--world-size", "3", "--ep-size", "2"], "does not divide"),
        (["RUN/checkpoints/latest", "--sp-size", "0"], "--sp-size is 0"),
        (["RUN/checkpoints/latest", "--world-size", "3", "--sp-size", "2"], "(2) does not divide"),
        (["RUN/checkpoints/latest", "--world-size", "4", "--set", "model.moe.topk=1"], "topk"),
    ],
)
def test_what_cannot_be_checked_is_refused(run: Path, options: list[str], sentence: str) -> None:
    done = run_here(TOOL, *(option.replace("RUN", os.fspath(run)) for option in options))
    assert done.returncode == 2 and sentence in done.stderr
