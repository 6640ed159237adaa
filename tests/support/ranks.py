"""Starts ranks that run many cases in one start: starting Python and DeepSpeed costs more than most
cases.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pretrain.engine.topology import free_port
from tests.support.fork_server import ForkedProgram

Case = dict[str, Any]
Results = dict[str, dict[str, Any]]


def run_cases(worker: str, cases: Sequence[Case], world_size: int, folder: Path) -> Results:
    """Runs all cases in one start of ``world_size`` ranks, and returns rank 0's results by name.

    Args:
        worker: a module of :mod:`tests.support.workers` with a function ``run_case``.
        cases: what the worker takes, each with a "name".
        folder: gets the cases, the results and a log of each rank.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(cases))
    results = folder / "results.jsonl"
    command = [sys.executable, "-m", "tests.support.rank_worker", worker]
    command += [str(folder / "cases.json"), str(results)]
    common = {
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    programs = [
        ForkedProgram(
            command,
            Path.cwd(),
            os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(world_size)
    ]
    try:
        codes = [program.wait(timeout=1500) for program in programs]
    finally:
        for rank, program in enumerate(programs):
            program.kill()
            (folder / f"rank{rank}.log").write_text("".join(program.communicate()))
    assert not any(codes), (folder / "rank0.log").read_text()[-3000:]
    return {result["name"]: result for result in map(json.loads, results.read_text().splitlines())}
