"""A real run whose ranks share sequences is killed, and continues at any sp_size.

Its curve is that of one process that was never interrupted; at the same topology bit for bit.
"""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from pretrain.engine.topology import free_port
from tests.support.tiny_run import SCRIPT, Started, Tiny, curve, start_ranks, wait_for_step

SAVED, STEPS = 3, 9
SETTINGS = ("checkpoint.background=false", "checkpoint.interval_steps=3", "checkpoint.keep_last=99")
COLUMNS = ("loss", "total_loss", "grad_norm", "validation_loss")


def finish(tiny: Tiny, run: Path, sp_size: int, steps: int) -> None:
    """Train a run to its end on ``sp_size`` ranks, all of which share each sequence."""
    arguments = tiny.arguments(run, f"parallel.sp_size={sp_size}", *SETTINGS, steps=steps)
    ranks = start_ranks(arguments, run.parent, world_size=sp_size)
    assert [rank.wait() for rank in ranks] == [0] * sp_size, [rank.stderr for rank in ranks]


def rows(run: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """Of the run's curve, by their kind and step."""
    return {(row["kind"], row["step"]): row for row in curve(run)}


@pytest.fixture(scope="module")
def killed(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By deepspeed's launcher on two ranks that share sequences; ends with a kill after step 3."""
    folder = tmp_path_factory.mktemp("killed")
    run = folder / "run"
    launcher = ["deepspeed", "--num_accelerators", "2", "--master_port", str(free_port()), SCRIPT]
    settings = ("parallel.sp_size=2", *SETTINGS)
    started = Started([*launcher, *tiny.arguments(run, *settings, steps=4000)], folder)
    wait_for_step(run, SAVED + 1, started)
    for process in started.alive():
        process.send_signal(signal.SIGKILL)
    started.wait()
    # A slow kill may come after further checkpoints.
    for later in (run / "checkpoints").glob("step_*"):
        if int(later.name.removeprefix("step_")) > SAVED:
            shutil.rmtree(later)
    assert [path.name for path in (run / "checkpoints").glob("step_*")] == [f"step_{SAVED}"]
    return run


def test_a_killed_run_continues_at_any_sp_size_as_if_one_process_had_trained_it(
    tiny: Tiny, killed: Path, tmp_path: Path
) -> None:
    run, reference = tmp_path / "moved", tmp_path / "reference"
    shutil.copytree(killed, run)
    finish(tiny, run, sp_size=1, steps=5)
    finish(tiny, run, sp_size=4, steps=7)
    finish(tiny, run, sp_size=2, steps=STEPS)
    finish(tiny, reference, sp_size=1, steps=STEPS)
    found, expected = rows(run), rows(reference)
    assert expected.keys() <= found.keys()
    assert {kind for kind, _ in expected} >= {"train", "validation"}
    for place, row in expected.items():
        for name in set(COLUMNS) & row.keys():
            assert found[place][name] == pytest.approx(row[name], rel=1e-6, abs=0), (place, name)


def test_at_the_same_topology_it_continues_bit_for_bit(
    tiny: Tiny, killed: Path, tmp_path: Path
) -> None:
    run, reference = tmp_path / "continued", tmp_path / "reference"
    shutil.copytree(killed, run)
    for folder in (run, reference):
        finish(tiny, folder, sp_size=2, steps=7)
    assert rows(run) == rows(reference)
