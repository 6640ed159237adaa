"""Every launcher trains the same model, ends with code 0 and leaves nothing behind."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.support.paths import LAUNCHERS, ROOT
from tests.support.tiny_run import Started, Tiny, curve

COLUMNS = ("loss", "total_loss", "grad_norm", "validation_loss")

FAKE_SRUN = """\
#!{python}
import os, subprocess, sys
command = [part for part in sys.argv[1:] if not part.startswith("--kill-on-bad-exit")]
with open("srun-environment.json", "w") as file:
    file.write(__import__("json").dumps({{name: os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT")}}))
if "SRUN_ENDS_WITH" in os.environ:
    sys.exit(int(os.environ["SRUN_ENDS_WITH"]))
tasks = []
for task in range(int(os.environ["SLURM_NTASKS"])):
    own = {{"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task), "SLURM_STEP_ID": "0"}}
    tasks.append(subprocess.Popen(command, env=os.environ | own))
sys.exit(max(task.wait() for task in tasks))
"""
FAKE_SCONTROL = """\
#!/usr/bin/env bash
if [[ "$1" == show ]]; then printf 'localhost\\nsecond-host\\n'; else echo "$@" >> scontrol.txt; fi
"""


def assert_same_curve(run: Path, reference: Path) -> None:
    """Rows of the same kind and step, whose losses and norms agree to 1e-6 relative."""
    rows, expected = curve(run), curve(reference)
    assert [(row["kind"], row["step"]) for row in rows] == [
        (row["kind"], row["step"]) for row in expected
    ]
    for row, other in zip(rows, expected, strict=True):
        for name in set(COLUMNS) & row.keys():
            assert row[name] == pytest.approx(other[name], rel=1e-6, abs=0), (row["step"], name)


@pytest.fixture
def slurm_tools(tmp_path: Path) -> Path:
    """Folder with stand-ins for the two programs of a SLURM machine; they set what SLURM sets."""
    tools = tmp_path / "slurm-tools"
    tools.mkdir()
    for name, text in (
        ("srun", FAKE_SRUN.format(python=sys.executable)),
        ("scontrol", FAKE_SCONTROL),
    ):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    return tools


def submit(tools: Path, spool: Path, arguments: list[str], **variables: str) -> Started:
    """Runs the batch script as SLURM does: a copy of it, elsewhere, with the job's variables."""
    script = Path(shutil.copy(LAUNCHERS / "slurm.sbatch", spool / "slurm_script"))
    job = {
        "SLURM_JOB_ID": "4242",
        "SLURM_JOB_NODELIST": "localhost,second-host",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
    }
    path = f"{tools}:{Path(sys.executable).parent}:/usr/bin:/bin"
    return Started(
        [script, *arguments], spool, job | {"SLURM_SUBMIT_DIR": str(ROOT), "PATH": path} | variables
    )


@pytest.mark.parametrize("script", ["run_deepspeed.sh", "run_torchrun.sh", "run_mpi.sh"])
def test_launchers_give_the_loss_curve_of_one_process(
    script: str, tiny: Tiny, reference: Path, tmp_path: Path
) -> None:
    started = Started(
        [LAUNCHERS / script, *tiny.arguments(tmp_path / "run", "parallel.ep_size=2")], tmp_path
    )
    assert started.wait() == 0, started.stderr
    assert "finished 5 steps" in started.stdout
    assert_same_curve(tmp_path / "run", reference)
    assert started.survivors() == []


def test_slurm_gives_the_loss_curve_of_one_process(
    slurm_tools: Path, tiny: Tiny, reference: Path, tmp_path: Path
) -> None:
    started = submit(slurm_tools, tmp_path, tiny.arguments(tmp_path / "run", "parallel.ep_size=2"))
    assert started.wait() == 0, started.stderr
    assert_same_curve(tmp_path / "run", reference)
    assert (
        json.loads((tmp_path / "srun-environment.json").read_text())["MASTER_ADDR"] == "localhost"
    )
    assert started.survivors() == []


@pytest.mark.parametrize(
    ("code", "variables", "requeued"),
    [
        (75, {}, True),
        (7, {}, False),
        (7, {"MAX_RESTARTS": "2", "SLURM_RESTART_COUNT": "1"}, True),
        (7, {"MAX_RESTARTS": "2", "SLURM_RESTART_COUNT": "2"}, False),
        (137, {"MAX_RESTARTS": "1"}, True),
        (75, {"MAX_RESTARTS": "2", "SLURM_RESTART_COUNT": "9"}, True),
        (3, {"MAX_RESTARTS": "2"}, False),
        (0, {"MAX_RESTARTS": "2"}, False),
    ],
)
def test_slurm_puts_preempted_runs_and_as_many_faults_as_allowed_back_into_the_queue(
    slurm_tools: Path, tmp_path: Path, code: int, variables: dict[str, str], requeued: bool
) -> None:
    started = submit(slurm_tools, tmp_path, [], SRUN_ENDS_WITH=str(code), **variables)
    assert started.wait() == code
    written = tmp_path / "scontrol.txt"
    assert (written.read_text() if written.exists() else None) == (
        "requeue 4242\n" if requeued else None
    )


def test_a_changed_seed_is_noticed_by_the_curve_comparison(
    tiny: Tiny, reference: Path, tmp_path: Path, in_process: None
) -> None:
    from pretrain.train import main

    assert main(tiny.arguments(tmp_path / "run", "seed=8")) == 0
    with pytest.raises(AssertionError):
        assert_same_curve(tmp_path / "run", reference)


RANK_THAT_SAVES = """\
import pathlib, signal, sys, time
stopped = []
signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
pathlib.Path(f"ready-{sys.argv[1]}").touch()
while not stopped:
    time.sleep(0.01)
sys.exit(75)
"""
# Like deepspeed, it ignores what happens to its ranks until they end, and hands on no signal.
LAUNCHER_THAT_FORWARDS_NOTHING = """\
import subprocess, sys
ranks = [subprocess.Popen([sys.executable, "-u", "pretrain.py", str(rank)]) for rank in range(2)]
sys.exit(max(rank.wait() for rank in ranks))
"""


def test_a_signal_to_the_launcher_reaches_the_ranks_and_their_exit_code_comes_back(
    tmp_path: Path,
) -> None:
    (tmp_path / "pretrain.py").write_text(RANK_THAT_SAVES)
    started = Started(
        [
            sys.executable,
            LAUNCHERS / "supervise.py",
            sys.executable,
            "-c",
            LAUNCHER_THAT_FORWARDS_NOTHING,
            "pretrain.py",
        ],
        tmp_path,
        new_interpreter=True,
    )
    deadline = time.monotonic() + 120
    while (
        not all((tmp_path / f"ready-{rank}").exists() for rank in range(2))
        and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    started.process.send_signal(signal.SIGTERM)
    assert started.wait() == 75, started.stderr
    assert started.survivors() == []
