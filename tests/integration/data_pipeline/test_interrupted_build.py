"""A real Ctrl-C, which a terminal sends to all processes of a command, at every stage: one
sentence, no traceback, nothing left running.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.paths import TOOLS

STAGES = ["sampling", "training the tokenizer", "choosing the engine", "encoding", "merging"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus that is large enough for an engine to be chosen."""
    folder, source = tmp_path_factory.mktemp("interrupted"), random.Random(0)
    words = [
        "".join(source.choices("abcdefghijklmnopqrstuvwxyz", k=source.randrange(2, 9)))
        for _ in range(5000)
    ]
    with (folder / "many.jsonl").open("w") as stream:
        for _ in range(6000):
            stream.write(json.dumps({"text": " ".join(source.choices(words, k=260))}) + "\n")
    return folder


def command(output: str, workers: int) -> list[str]:
    options = [
        "--input",
        "many.jsonl",
        "--vocab-size",
        "3000",
        "--output",
        output,
        "--workers",
        str(workers),
        "--set",
        "data.unit_bytes=100000",
    ]
    return [sys.executable, str(TOOLS / "preprocess_data.py"), *options]


def start(arguments: list[str], folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        arguments,
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def interrupt_at(
    process: subprocess.Popen[str], sign: str, times: int = 1, delay: float = 0.02
) -> tuple[int, str]:
    """Ctrl-C ``delay`` seconds after a line of standard error has ``sign`` in it; the exit code and
    what was printed after it.
    """
    assert process.stderr is not None
    for line in process.stderr:
        if sign in line:
            break
    for _ in range(times):
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    for _ in range(100):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return process.returncode, errors
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    pytest.fail(f"processes of the interrupted command were still there: {errors}")


def assert_one_sentence(code: int, errors: str) -> None:
    assert code == 130, errors
    assert "Traceback" not in errors and "Error" not in errors and "leaked" not in errors, errors
    [sentence] = [line for line in errors.splitlines() if line.startswith("interrupted")]
    assert sentence.endswith("run the same command again to continue.")


def test_ctrl_c_ends_workers_too_and_says_what_is_kept(work: Path) -> None:
    code, errors = interrupt_at(start(command("encoding", 2), work), "encoding")
    assert_one_sentence(code, errors)
    assert "what is finished is kept in encoding/.building" in errors
    assert not (work / "encoding" / "manifest.json").exists()


@pytest.mark.full
def test_ctrl_c_at_every_stage_is_one_sentence_and_the_same_command_continues(work: Path) -> None:
    reached = []
    for number, stage in enumerate(STAGES):
        code, errors = interrupt_at(
            start(command("data", 1 + number % 2), work), stage, times=1 + number % 2
        )
        if code == 0 and stage == "merging":
            continue  # it was faster than the signal
        assert_one_sentence(code, errors)
        assert not (work / "data" / "manifest.json").exists()
        reached.append(stage)
    assert reached[:4] == STAGES[:4]
    assert subprocess.run(command("data", 2), cwd=work, capture_output=True).returncode == 0
    assert subprocess.run(command("undisturbed", 1), cwd=work, capture_output=True).returncode == 0
    content = {path.name: path.read_bytes() for path in (work / "undisturbed").iterdir()}
    assert {path.name: path.read_bytes() for path in (work / "data").iterdir()} == content


@pytest.mark.parametrize(
    "tool,delay",
    [("preprocess_data.py", 0.02), *(("evaluate.py", 0.02 + 0.15 * part) for part in range(8))],
)
def test_ctrl_c_while_modules_are_imported_is_one_sentence_too(
    tmp_path: Path, tool: str, delay: float
) -> None:
    """NumPy and torch catch an exception in their own imports: they would fail in another way, go
    on, or crash.
    """
    process = start([sys.executable, "-X", "importtime", str(TOOLS / tool), "--help"], tmp_path)
    code, errors = interrupt_at(process, "pretrain.core.interrupts", delay=delay)
    assert_one_sentence(code, errors)
    assert "interrupted; run the same command again to continue." in errors
