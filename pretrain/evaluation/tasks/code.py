"""pass@k of programs that a model writes (Chen et al. 2021, arXiv 2107.03374)."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from pretrain.core.errors import ConfigError, DataError
from pretrain.evaluation.heldout.references import read_jsonl
from pretrain.evaluation.tasks.sandbox import ProgramRun, run_program

if TYPE_CHECKING:  # imports what reads models, and training needs the problems alone
    from pretrain.evaluation.generation.writing import Writer

# Strings that end a solution of HumanEval (Chen et al. 2021, section 2.1).
STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")


@dataclass(frozen=True)
class Problem:
    """A prompt that a solution follows, and tests that call it: a line of HumanEval's file."""

    task_id: str
    prompt: str
    test: str
    entry_point: str | None = None

    def program(self, solution: str) -> str:
        """Prompt, solution and tests.

        HumanEval's tests define ``check``, which is called with the solution.
        """
        call = f"\ncheck({self.entry_point})\n" if self.entry_point else ""
        return f"{self.prompt}{solution}\n\n{self.test}\n{call}"


@dataclass(frozen=True)
class CodeScore:
    """``pass_at`` by k.

    ``passed`` of ``samples`` solutions of each problem. ``without_network``: whether programs could
    not reach one.
    """

    problems: int
    samples: int
    pass_at: dict[int, float]
    passed: dict[str, int]
    timed_out: int
    without_network: bool


def read_problems(path: Path) -> list[Problem]:
    """Problems of a JSONL file with "task_id", "prompt", "test" and, for HumanEval, "entry_point".

    Raises:
        DataError: if it cannot be read, or a line lacks one of them.
    """
    problems = []
    for number, row in enumerate(read_jsonl(path), start=1):
        if not all(isinstance(row.get(name), str) for name in ("task_id", "prompt", "test")):
            raise DataError(
                f'{path}, problem {number} has no "task_id", "prompt" and "test" that are texts:'
                " correct it"
            )
        entry_point = row.get("entry_point")
        problems.append(
            Problem(
                str(row["task_id"]),
                str(row["prompt"]),
                str(row["test"]),
                str(entry_point) if entry_point else None,
            )
        )
    return problems


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """An unbiased estimate of the chance that one of k solutions passes (eq. 1).

    1 - C(n - c, k) / C(n, k) for c = ``passed`` of n = ``samples``.

    Raises:
        ConfigError: if k is not from 1 to ``samples``.
    """
    if not 1 <= k <= samples:
        raise ConfigError(
            f"pass@{k} needs at least {k} samples of each problem, not {samples}: raise"
            " --num-samples, or lower --pass-at"
        )
    # Exact integers: the product form in floats overflows for many samples.
    return 1.0 - math.comb(samples - passed, k) / math.comb(samples, k)


def score_code(
    problems: Sequence[Problem],
    writer: Writer,
    samples: int,
    pass_at: Sequence[int],
    batch_size: int,
    timeout_seconds: float,
    memory_bytes: int,
) -> CodeScore:
    """Writes ``samples`` solutions of each problem, and executes each with the problem's tests.

    Raises:
        ConfigError: for a k that needs more samples.
    """
    # Before texts are written, which takes long.
    for k in pass_at:
        pass_at_k(samples, 0, k)
    prompts = [problem.prompt for problem in problems for _ in range(samples)]
    texts = writer.write(prompts, batch_size)
    programs = [
        problem.program(texts[index * samples + number].text)
        for index, problem in enumerate(problems)
        for number in range(samples)
    ]
    runs = run_programs(programs, timeout_seconds, memory_bytes)
    passed = {
        problem.task_id: sum(
            run.outcome == "passed" for run in runs[index * samples : (index + 1) * samples]
        )
        for index, problem in enumerate(problems)
    }
    means = {
        k: sum(pass_at_k(samples, count, k) for count in passed.values()) / len(passed)
        for k in pass_at
    }
    timed_out = sum(run.outcome == "timed out" for run in runs)
    return CodeScore(
        len(problems), samples, means, passed, timed_out, all(run.without_network for run in runs)
    )


def run_programs(
    programs: Sequence[str], timeout_seconds: float, memory_bytes: int
) -> list[ProgramRun]:
    """Runs programs, as many at once as there are cores."""

    def run(program: str) -> ProgramRun:
        return run_program(program, timeout_seconds, memory_bytes)

    # Threads only wait for the programs, which are processes. sched_getaffinity respects the cores
    # of a container, unlike os.cpu_count.
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(
            tqdm(
                pool.map(run, programs),
                total=len(programs),
                desc="running programs",
                unit="program",
            )
        )
