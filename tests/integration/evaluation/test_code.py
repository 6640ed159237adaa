"""Programs in the sandbox, and pass@k of what a real model and a made one write."""

from __future__ import annotations

import itertools
import math
import socket
import time
from pathlib import Path

import psutil
import pytest

from pretrain.core.errors import ConfigError, DataError
from pretrain.evaluation.tasks.code import Problem, pass_at_k, read_problems, run_programs
from pretrain.evaluation.tasks.sandbox import run_program

MEMORY = 512 << 20


def test_a_program_passes_when_its_tests_do() -> None:
    assert run_program("assert sum([1, 2]) == 3", 20).outcome == "passed"
    failed = run_program("assert sum([1, 2]) == 4", 20)
    assert failed.outcome == "failed" and "AssertionError" in failed.error


@pytest.mark.parametrize(
    "escape",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "raise SystemExit",
        "import os; os.kill(os.getpid(), 9)",
    ],
)
def test_a_program_that_leaves_before_its_tests_has_not_passed(escape: str) -> None:
    assert run_program(f"{escape}\nassert False", 20).outcome == "failed"


def test_time_memory_files_and_the_network_are_limited() -> None:
    assert run_program("while True: pass", 1.0).outcome == "timed out"
    assert "MemoryError" in run_program("x = bytearray(1 << 30)", 20, MEMORY).error
    assert run_program("x = bytearray(1 << 20)", 20, MEMORY).outcome == "passed"
    assert "File too large" in run_program("open('large', 'wb').write(bytes(8 << 20))", 20).error
    inside = run_program(
        f"import os\nassert os.listdir() and not os.path.samefile('.', {str(Path.cwd())!r})\nassert"
        " 'TEST_SECRET' not in os.environ",
        20,
    )
    assert inside.outcome == "passed", inside.error
    reach = "import socket\ns = socket.socket()\ns.settimeout(5)\ns.connect(('127.0.0.1', {port}))"
    with socket.create_server(("127.0.0.1", 0)) as server:
        connected = run_program(reach.format(port=server.getsockname()[1]), 20)
    assert (connected.outcome == "failed") == connected.without_network


def test_processes_that_a_program_leaves_behind_are_killed() -> None:
    mark = f"{time.time_ns()}"
    source = (
        "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time;"
        f" time.sleep(300) # {mark}'])"
    )
    assert run_program(source, 20).outcome == "passed"
    deadline = time.monotonic() + 10
    while any(
        mark in " ".join(process.info["cmdline"] or [])
        for process in psutil.process_iter(["cmdline"])
    ):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_pass_at_k_is_the_share_of_all_choices_of_k_that_hold_a_right_one() -> None:
    for samples, passed in ((5, 0), (5, 2), (7, 3), (6, 6)):
        right = [True] * passed + [False] * (samples - passed)
        for k in range(1, samples + 1):
            choices = list(itertools.combinations(right, k))
            assert pass_at_k(samples, passed, k) == pytest.approx(
                sum(map(any, choices)) / len(choices)
            )
    # The plain estimate 1 - (1 - c/n)^k is biased: the comparison above would show it.
    assert not math.isclose(pass_at_k(5, 2, 2), 1 - (1 - 2 / 5) ** 2)
    for k in (0, 6):
        with pytest.raises(ConfigError, match=f"pass@{k} needs"):
            pass_at_k(5, 2, k)


def test_a_problem_s_program_is_prompt_solution_and_tests() -> None:
    problem = Problem(
        "T/0", "def add(a, b):\n", "def check(candidate):\n    assert candidate(2, 3) == 5\n", "add"
    )
    outcomes = [
        run.outcome
        for run in run_programs(
            [problem.program(f"    return a {sign} b") for sign in "+-"], 20, MEMORY
        )
    ]
    assert outcomes == ["passed", "failed"]
    without_entry_point = Problem("T/1", "def add(a, b):\n", "assert add(2, 3) == 5")
    assert run_program(without_entry_point.program("    return a + b"), 20).outcome == "passed"


def test_a_problem_without_tests_is_refused_with_its_number(tmp_path: Path) -> None:
    (tmp_path / "problems.jsonl").write_text(
        '{"task_id": "a", "prompt": "p", "test": "t"}\n{"task_id": "b", "prompt": "p"}\n'
    )
    with pytest.raises(DataError, match="problem 2 has no"):
        read_problems(tmp_path / "problems.jsonl")
