"""The image's steps, run in order in a clean folder: what `docker build` would do behind its base
image.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pathspec import GitIgnoreSpec

from tests.support.paths import ROOT

TARGETS = ("cpu", "cuda")
Instruction = tuple[str, str]


def instructions(target: str) -> list[Instruction]:
    """(name, rest) of every instruction of one target, in order."""
    text = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
    lines = [
        line.split(maxsplit=1)
        for line in text.splitlines()
        if line.strip() and not line.startswith("#")
    ]
    stages = [index for index, (name, _) in enumerate(lines) if name == "FROM"]
    for start, stop in zip(stages, [*stages[1:], len(lines)], strict=True):
        if lines[start][1].endswith(f" AS {target}"):
            return [(name, rest) for name, rest in lines[start + 1 : stop]]
    raise AssertionError(f"the Dockerfile has no target {target}")


def default_arguments() -> dict[str, str]:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    return dict(re.findall(r"^ARG (\w+)=(.+)$", text, flags=re.MULTILINE))


def docker_ignores() -> GitIgnoreSpec:
    """What .dockerignore keeps out of the build; its patterns begin at the root."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    return GitIgnoreSpec.from_lines(
        [f"/{line}" for line in lines if line and not line.startswith("#")]
    )


def context_files() -> list[str]:
    """What `COPY . .` takes."""
    ignored, files = docker_ignores(), []
    for folder, folders, names in os.walk(ROOT):
        here = Path(folder).relative_to(ROOT)
        folders[:] = [name for name in folders if not ignored.match_file(here / name)]
        files += [(here / name).as_posix() for name in names if not ignored.match_file(here / name)]
    return files


def copy(sources: list[str], folder: Path) -> None:
    """As from a clone of this moment, which an image's earlier layers may be older than."""
    for name in context_files() if sources == ["."] else sources:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)


@pytest.mark.parametrize("target", TARGETS)
def test_every_step_is_one_of_make_and_every_copied_file_is_there(target: str) -> None:
    made = set(
        re.findall(
            r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE
        )
    )
    steps = [rest for name, rest in instructions(target) if name == "RUN"]
    packages, *of_make = steps
    assert packages.startswith("apt-get update && apt-get install")
    assert of_make and all(
        step.split()[0] == "make" and step.split()[1] in made for step in of_make
    )
    for name, rest in instructions(target):
        if name == "COPY":
            assert all((ROOT / source).exists() for source in rest.split()[:-1])


def test_both_targets_take_the_same_steps_behind_their_packages() -> None:
    cpu, cuda = (instructions(target) for target in TARGETS)
    packages = [next(step for step in steps if step[0] == "RUN") for steps in (cpu, cuda)]
    assert packages[0] != packages[1]
    assert [step for step in cpu if step != packages[0]] == [
        step for step in cuda if step != packages[1]
    ]


def outputs() -> set[str]:
    """The first part of every path below the project that a command of the documentation writes or
    reads.
    """
    texts = [
        path.read_text(encoding="utf-8")
        for path in (*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("tools/*.py"))
    ]
    commands = [line for text in texts for line in text.splitlines() if "python tools/" in line]
    found = [
        re.findall(r"--(?:output|output-prefix|from hf) (\w+)", command) for command in commands
    ]
    return {name for names in found for name in names} | {"runs"}


def test_what_the_documentations_commands_write_is_neither_in_an_image_nor_a_change_of_the_code() -> (
    None
):
    written, ignored = outputs(), docker_ignores()
    assert {
        "data",
        "downloads",
        "exports",
        "sweeps",
        "ablations",
        "averaged",
        "upcycled",
    } <= written
    assert [name for name in written if not ignored.match_file(f"{name}/file")] == []
    command = ["git", "check-ignore", "--no-index", *(f"{name}/file" for name in written)]
    seen = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert {path.split("/")[0] for path in seen} == written
    for name in (
        ".git",
        ".venv",
        "runs/quickstart/checkpoints/latest",
        "pretrain/__pycache__/train.pyc",
    ):
        assert ignored.match_file(name)


def test_an_image_has_every_file_of_the_project() -> None:
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert [name for name in tracked if docker_ignores().match_file(name)] == []
    assert {"pretrain/train.py", "Makefile", "README.md"} <= set(context_files())


@pytest.mark.parametrize("left_out", [0, 1])
def test_a_container_installs_nothing_anew(tmp_path: Path, left_out: int) -> None:
    """The steps of the Makefile in order; what pip would do is left out."""
    (python := tmp_path / ".venv" / "bin" / "python").parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\nexit 0\n")
    python.chmod(0o755)
    steps = [
        (name, rest)
        for name, rest in instructions("cpu")
        if name == "COPY" or rest.startswith("make")
    ]
    for name, rest in steps[: len(steps) - left_out]:
        if name == "COPY":
            time.sleep(0.02)
            copy(rest.split()[:-1], tmp_path)
        else:
            subprocess.run(
                [*rest.split(), f"PYTHON={sys.executable}"],
                cwd=tmp_path,
                check=True,
                capture_output=True,
            )
    assert subprocess.run(["make", "-q", "install"], cwd=tmp_path).returncode == left_out


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_the_steps_of_the_cpu_image_work_in_order_in_a_clean_folder(tmp_path: Path) -> None:
    # Without the path of the tests, which would hide the code that was copied.
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment = inherited | default_arguments()
    for name, rest in instructions("cpu"):
        if name == "COPY":
            copy(rest.split()[:-1], tmp_path)
        elif name == "ENV":
            variable, value = rest.split("=", 1)
            environment[variable] = (
                value.strip('"')
                .replace("/app", str(tmp_path))
                .replace("$PATH", environment["PATH"])
            )
        elif name == "RUN" and rest.startswith("make"):
            subprocess.run(rest, shell=True, cwd=tmp_path, env=environment, check=True)
    planned = [
        "python",
        "launchers/pretrain.py",
        "--recipe",
        "debug",
        "--dry-run",
        "--world-size",
        "2",
    ]
    shown = subprocess.run(
        planned, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert "debug" in shown
    assert (
        "make quickstart"
        in subprocess.run(
            ["make", "help"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
