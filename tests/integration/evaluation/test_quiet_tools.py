"""In a terminal the tools ask nothing and let no other library speak; with ``--json -`` standard
output is JSON alone.
"""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest

from data_pipeline.shards.token_stream import open_split
from pretrain.core.errors import BAD_CHECKPOINT, DONE
from pretrain.export.convert import export_hf
from tests.support.hf_folders import copy_of, edit_json, evil_code
from tests.support.paths import WORKERS
from tests.support.tiny_checkpoint import Trained
from tests.support.workers.lm_eval_harness import TASKS, write_tasks

WORKER = WORKERS / "terminal_tool.py"
# Bars with a name, and the speeds of generation: all that a tool says beside its result.
OWN_LINES = re.compile(
    r"(validation windows|generating|encoding windows|log-likelihoods|Tokenizing inputs|Running \w+"
    r" requests): .*|prefill: .*|"
)


@dataclass(frozen=True)
class Said:
    code: int
    stdout: str
    lines: list[str]


def in_a_terminal(folder: Path, commands: list[list[str | Path]]) -> list[Said]:
    """What each command prints where standard input and standard error are a terminal in which
    nobody types.
    """
    file = folder / "commands.json"
    file.write_text(json.dumps([list(map(str, command)) for command in commands]))
    ours, theirs = pty.openpty()
    shown = bytearray()

    def read() -> None:
        try:
            while piece := os.read(ours, 4096):
                shown.extend(piece)
        except OSError:  # the other end is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    process = subprocess.Popen(
        # -P: evaluate.py would start this process again with it, and the commands with it.
        [sys.executable, "-P", str(WORKER), str(file)],
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=environment,
    )
    os.close(theirs)
    output, _ = process.communicate(timeout=300)
    reader.join(timeout=10)
    os.close(ours)
    ends = re.compile(r"\n=(-?\d+)=\n")
    standard = ends.split(output.decode())
    errors = ends.split(shown.decode().replace("\r\n", "\n").replace("\r", "\n"))
    assert len(standard) == len(errors) == 2 * len(commands) + 1, (output.decode(), shown.decode())
    return [
        Said(int(standard[2 * n + 1]), standard[2 * n], errors[2 * n].splitlines())
        for n in range(len(commands))
    ]


@pytest.fixture(scope="module")
def own_class(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("custom") / "hf"
    export_hf(
        trained.checkpoint,
        output,
        open_split(trained.manifest, "validation"),
        trained.model.head.weight.dtype,
        False,
        target_name="custom",
    )
    return output


def foreign(folder: Path) -> None:
    (folder / "evil.py").write_text(evil_code(folder.with_name("canary")))
    edit_json(
        folder,
        model_type="evil",
        auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    )


def commands_for(folder: Path, trained: Trained, *more: str | Path) -> list[list[str | Path]]:
    heldout = ["--data", trained.data, "--max-windows", "2"]
    return [
        [
            "generate.py",
            "--model",
            folder,
            "--prompt",
            "11 +",
            "--max-new-tokens",
            "3",
            "--json",
            "-",
            *more,
        ],
        ["evaluate.py", "--checkpoint", folder, *heldout, "--json", "-"],
    ]


def test_our_own_class_never_asks_and_strangers_are_refused_without_a_question(
    trained: Trained, own_class: Path, tmp_path: Path
) -> None:
    strange = copy_of(own_class, tmp_path / "strange", foreign)
    said = in_a_terminal(
        tmp_path, commands_for(own_class, trained) + commands_for(strange, trained)
    )
    for one in said[:2]:
        assert one.code == DONE, one.lines
        assert isinstance(json.loads(one.stdout), dict)
        assert [line for line in one.lines if not OWN_LINES.fullmatch(line)] == []
    for one in said[2:]:
        assert (
            one.code == BAD_CHECKPOINT and one.stdout == "" and not (tmp_path / "canary").exists()
        )
        assert len([line for line in one.lines if line]) == 1 and one.lines[0].startswith(
            "error: "
        ), one.lines


@pytest.mark.full
def test_an_import_shows_its_own_bars_and_result_alone(exported: Path, tmp_path: Path) -> None:
    (said,) = in_a_terminal(
        tmp_path,
        [
            [
                "convert_checkpoint.py",
                "--from",
                "hf",
                exported,
                "--output",
                tmp_path / "ours",
                "--json",
                "-",
            ]
        ],
    )
    assert said.code == DONE and json.loads(said.stdout)["tensors"] > 0, said.lines
    assert [
        line
        for line in said.lines
        if not re.fullmatch(r"(writing weights|reading back|comparing logits): .*|", line)
    ] == []


@pytest.mark.full
def test_tasks_of_the_harness_leave_standard_output_to_json(
    trained: Trained, own_class: Path, exported: Path, tmp_path: Path
) -> None:
    write_tasks(tmp_path)
    tasks = ["--tasks", ",".join(TASKS), "--include-path", tmp_path, "--limit", "3", "--json", "-"]
    said = in_a_terminal(
        tmp_path,
        [
            ["evaluate.py", "--checkpoint", folder, *tasks]
            for folder in (own_class, exported, trained.checkpoint)
        ],
    )
    for one in said:
        assert one.code == DONE, one.lines
        assert set(json.loads(one.stdout)["tasks"]) == set(TASKS)
        assert [line for line in one.lines if not OWN_LINES.fullmatch(line)] == []
