"""Which ends are started again, how often, and on which hosts."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.core.errors import ConfigError
from pretrain.run.restarts import (
    Budget,
    Hosts,
    checkpoint_pointer,
    failed_host,
    newest_checkpoint,
    without_fresh,
)

MPICH = """\
===================================================================================
=   BAD TERMINATION OF ONE OF YOUR APPLICATION PROCESSES
=   PID 32155 RUNNING AT node-b
=   EXIT CODE: 9
"""


@pytest.mark.parametrize("code", [0, 2, 3, 4, 5, 6, 75, 126, 127, 130])
def test_ends_that_a_start_cannot_repair_are_final(code: int) -> None:
    assert Budget(max_restarts=5).delay(code, has_progress=True) is None


@pytest.mark.parametrize("code", [1, 7, 9, 134, 137, 143])
def test_faults_are_started_again_with_growing_delays_up_to_the_budget(code: int) -> None:
    budget = Budget(max_restarts=3, first_delay_seconds=5.0)
    assert [budget.delay(code, False) for _ in range(4)] == [5.0, 10.0, 20.0, None]


def test_progress_resets_budget_and_delay() -> None:
    budget = Budget(max_restarts=2, first_delay_seconds=5.0)
    delays = [budget.delay(7, progress) for progress in (False, False, True, False, False)]
    assert delays == [5.0, 10.0, 5.0, 10.0, None]


def test_no_delay_is_longer_than_five_minutes_and_the_default_starts_nothing() -> None:
    assert Budget(max_restarts=99, used=50).delay(7, False) == 300.0
    assert Budget().delay(7, True) is None


def test_a_preempted_run_starts_again_only_if_asked_to() -> None:
    budget = Budget.from_environment({"MAX_RESTARTS": "1", "RESTART_PREEMPTED": "1"})
    assert budget.delay(75, True) == 5.0
    with pytest.raises(ConfigError, match="MAX_RESTARTS"):
        Budget.from_environment({"MAX_RESTARTS": "many"})


def test_the_checkpoints_of_a_command_are_found_as_the_ranks_find_them(tmp_path: Path) -> None:
    command = ["deepspeed", "--num_accelerators", "2", "launchers/pretrain.py", "--fresh"]
    options = ["--recipe", "debug", "--set", f"run_path={tmp_path}", "--ds_config", "zero1"]
    pointer = checkpoint_pointer([*command, *options])
    assert pointer == tmp_path / "checkpoints" / "latest"
    assert newest_checkpoint(pointer) is None
    pointer.parent.mkdir()
    pointer.write_text("step_3")
    assert newest_checkpoint(pointer) == "step_3"
    assert checkpoint_pointer([*command, "--recipe", "nothing of this name"]) is None
    assert checkpoint_pointer(["true"]) is None


def test_a_restart_does_not_delete_the_run_again() -> None:
    command = ["mpirun", "-n", "2", "python", "pretrain.py", "--fresh", "--overwr", "--recipe", "a"]
    assert without_fresh(command) == ["mpirun", "-n", "2", "python", "pretrain.py", "--recipe", "a"]


def test_the_host_of_a_fault_is_read_from_what_launchers_print() -> None:
    assert failed_host(MPICH.splitlines()) == "node-b"
    lost = "pdsh@head: node-a: ssh exited with exit code 7"
    killed = "pdsh@head: node-c: ssh exited with exit code 247"
    assert failed_host([lost, killed]) == "node-c"
    assert failed_host([lost, "something else"]) is None


@pytest.mark.parametrize(
    ("lines", "left"),
    [
        ("node-a:4\nnode-b:4\n", "node-a:4\n"),
        ("node-a slots=4\nnode-b slots=4", "node-a slots=4\n"),
    ],
)
def test_a_host_that_failed_twice_is_left_out(tmp_path: Path, lines: str, left: str) -> None:
    file = tmp_path / "hosts"
    file.write_text(f"# all of them\n{lines}")
    hosts = Hosts(
        ["mpirun", "--hostfile", str(file), "-n", "8", "python", "pretrain.py", "-n", "8"]
    )
    assert hosts.note_fault(MPICH.splitlines()) is None
    sentence = hosts.note_fault(MPICH.splitlines())
    assert sentence is not None and "host node-b has failed 2 times" in sentence
    assert hosts.file is not None and hosts.file.read_text() == left
    assert hosts.command[3:] == ["-n", "4", "python", "pretrain.py", "-n", "8"]
    assert "node-b" in file.read_text()
    hosts.file.unlink()


def test_the_last_host_is_not_left_out(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("node-b:4\n")
    hosts = Hosts(["mpirun", "--hostfile", str(file), "-n", "4", "python", "pretrain.py"])
    hosts.note_fault(MPICH.splitlines())
    with pytest.raises(ConfigError, match="names no other"):
        hosts.note_fault(MPICH.splitlines())
