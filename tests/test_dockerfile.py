"""The image's steps, run in order in a clean folder: what `docker build` would do behind its base image."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TARGETS = ("cpu", "cuda")
Instruction = tuple[str, str]


def instructions(target: str) -> list[Instruction]:
    """(name, rest) of every instruction of one target, in order."""
    text = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line.strip() and not line.startswith("#")]
    stages = [index for index, (name, _) in enumerate(lines) if name == "FROM"]
    for start, stop in zip(stages, [*stages[1:], len(lines)], strict=True):
        if lines[start][1].endswith(f" AS {target}"):
            return [(name, rest) for name, rest in lines[start + 1 : stop]]
    raise AssertionError(f"the Dockerfile has no target {target}")


def default_arguments() -> dict[str, str]:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    return dict(re.findall(r"^ARG (\w+)=(.+)$", text, flags=re.MULTILINE))


def context_files() -> list[str]:
    """What `COPY . .` takes: tracked files, and new ones that git does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


def copy(sources: list[str], folder: Path) -> None:
    for name in context_files() if sources == ["."] else sources:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


@pytest.mark.parametrize("target", TARGETS)
def test_every_step_is_one_of_make_and_every_copied_file_is_there(target: str) -> None:
    made = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    steps = [rest for name, rest in instructions(target) if name == "RUN"]
    packages, *of_make = steps
    assert packages.startswith("apt-get update && apt-get install")
    assert of_make and all(step.split()[0] == "make" and step.split()[1] in made for step in of_make)
    for name, rest in instructions(target):
        if name == "COPY":
            assert all((ROOT / source).exists() for source in rest.split()[:-1])


def test_both_targets_take_the_same_steps_behind_their_packages() -> None:
    cpu, cuda = (instructions(target) for target in TARGETS)
    packages = [next(step for step in steps if step[0] == "RUN") for steps in (cpu, cuda)]
    assert packages[0] != packages[1]
    assert [step for step in cpu if step != packages[0]] == [step for step in cuda if step != packages[1]]


def test_no_image_carries_data_runs_or_the_environment_of_the_host() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert {".venv", ".git", "data", "runs"} <= set(ignored)


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_the_steps_of_the_cpu_image_work_in_order_in_a_clean_folder(tmp_path: Path) -> None:
    environment = os.environ | default_arguments()
    for name, rest in instructions("cpu"):
        if name == "COPY":
            copy(rest.split()[:-1], tmp_path)
        elif name == "ENV":
            variable, value = rest.split("=", 1)
            environment[variable] = value.strip('"').replace("/app", str(tmp_path)).replace("$PATH", environment["PATH"])
        elif name == "RUN" and rest.startswith("make"):
            subprocess.run(rest, shell=True, cwd=tmp_path, env=environment, check=True)
    planned = ["python", "launchers/pretrain.py", "--recipe", "debug", "--dry-run", "--world-size", "2"]
    shown = subprocess.run(planned, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    assert "debug" in shown
    assert "make quickstart" in subprocess.run(["make", "help"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
