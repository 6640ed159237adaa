"""tools/build_from_source.sh: its commands, dry and with git and Python replaced by recorders."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.paths import ROOT

SCRIPT = ROOT / "tools" / "build_from_source.sh"
VARIABLES = (
    "PYTHON_VERSION", "CUDA_VERSION", "TORCH_CUDA_ARCH_LIST", "SKIP_TORCH", "SKIP_FLASH_ATTN",
    "TORCH_REF", "FLASH_ATTN_REF",
)  # fmt: skip
# Writes its name and its arguments, a line a call; makes what a real one would leave behind.
RECORDER = """#!/bin/sh
printf '%s' "$(basename "$0")" >> "$RECORD"
for argument in "$@"; do printf '\\037%s' "$argument" >> "$RECORD"; done
printf '\\036' >> "$RECORD"
case "$*" in
  clone*) for last; do :; done; mkdir -p "$last/.git" ;;
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
esac
case "$*" in *"$FAIL_AT"*) test -n "$FAIL_AT" && exit 7 ;; esac
exit 0
"""


def build(
    folder: Path, *arguments: str, **variables: str
) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    """Run the script with recorders on PATH; returns it and the calls that were recorded."""
    tools, cuda = folder / "bin", folder / "cuda"
    for name in ("git", "python3.11", "python3.12"):
        tools.mkdir(exist_ok=True)
        (tools / name).write_text(RECORDER)
        (tools / name).chmod(0o755)
    (cuda / "bin").mkdir(parents=True, exist_ok=True)
    shutil.copy(tools / "git", cuda / "bin" / "nvcc")
    record = folder / "record"
    record.write_text("")
    environment = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "RECORD": str(record),
        "FAIL_AT": "",
        "VENV": str(folder / "venv"),
        "BUILD_DIR": str(folder / "sources"),
        "CUDA_HOME": str(cuda),
        "MAX_JOBS": "3",
    }
    done = subprocess.run(
        [SCRIPT, *arguments],
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    calls = [call.split("\x1f") for call in record.read_text().split("\x1e") if call]
    return done, calls


def printed(output: str) -> list[list[str]]:
    """The commands that the script printed, without their settings."""
    found = []
    for line in output.splitlines():
        words = shlex.split(line.removeprefix("+ "))
        if words[0] == "env":
            words = [word for word in words[1:] if "=" not in word or word.startswith("-")]
        found.append([Path(words[0]).name, *words[1:]])
    return found


def test_every_variable_is_named_in_the_help() -> None:
    done = subprocess.run([SCRIPT, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and all(f"  {name} " in done.stdout for name in VARIABLES)
    assert "examples:" in done.stdout and max(map(len, done.stdout.splitlines())) <= 100


def test_a_build_makes_the_calls_that_a_dry_run_prints(tmp_path: Path) -> None:
    dry, nothing = build(tmp_path, "--dry-run")
    assert dry.returncode == 0 and nothing == [] and not (tmp_path / "venv").exists()
    done, calls = build(tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == dry.stdout
    assert calls == [call for call in printed(dry.stdout) if call[0] != "mkdir"]
    text = dry.stdout
    assert "TORCH_CUDA_ARCH_LIST=9.0 MAX_JOBS=3 PYTORCH_BUILD_VERSION=2.13.0" in text
    assert "FLASH_ATTENTION_FORCE_BUILD=TRUE FLASH_ATTN_CUDA_ARCHS=90" in text
    # The project comes last, and must not replace what was built.
    last = calls[-2]
    assert last[:4] == ["python", "-m", "pip", "install"] and "--constraint" in last
    assert last[-1].startswith(str(ROOT))


def test_a_second_build_fetches_the_sources_it_has_and_keeps_the_environment(
    tmp_path: Path,
) -> None:
    build(tmp_path)
    done, calls = build(tmp_path, TORCH_REF="main", FLASH_ATTN_REF="v9.9.9")
    assert done.returncode == 0
    git = [call[3:] for call in calls if call[0] == "git"]
    assert ["fetch", "--depth", "1", "origin", "main"] in git
    assert ["fetch", "--depth", "1", "origin", "v9.9.9"] in git
    assert not any("clone" in call or "venv" in call for call in calls)
    # A branch is no release, so its own version stands.
    assert "PYTORCH_BUILD_VERSION" not in done.stdout


def test_parts_can_be_left_out(tmp_path: Path) -> None:
    done, calls = build(
        tmp_path,
        SKIP_TORCH="1",
        PYTHON_VERSION="3.12",
        TORCH_CUDA_ARCH_LIST="8.0;9.0a+PTX",
    )
    assert done.returncode == 0 and not any("pytorch" in word for call in calls for word in call)
    assert calls[0][0] == "python3.12" and "FLASH_ATTN_CUDA_ARCHS=80\\;90" in done.stdout
    done, calls = build(tmp_path, CUDA_VERSION="none", CUDA_HOME="/nowhere")
    assert done.returncode == 0 and "USE_CUDA=0" in done.stdout
    assert not any("flash-attention" in word for call in calls for word in call)


@pytest.mark.parametrize(
    "arguments,variables,told",
    [
        (("--dry",), {}, "unknown option '--dry': see --help"),
        ((), {"SKIP_TORCH": "yes"}, "SKIP_TORCH=yes: give 0 or 1"),
        ((), {"PYTHON_VERSION": "2"}, "PYTHON_VERSION=2: give 3.11"),
        ((), {"PYTHON_VERSION": "3.99"}, "python3.99 is not on PATH: install it"),
        ((), {"CUDA_VERSION": "12"}, "CUDA_VERSION=12: give 12.8"),
        ((), {"CUDA_HOME": "/nowhere"}, "there is no /nowhere/bin/nvcc"),
        ((), {"TORCH_CUDA_ARCH_LIST": "9.0; rm -rf"}, "give compute capabilities such as 8.0;9.0"),
        ((), {"MAX_JOBS": "0"}, "MAX_JOBS=0: give a number from 1"),
        ((), {"TORCH_REF": "--upload-pack=x"}, "are names of tags or branches"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence_before_anything_is_done(
    tmp_path: Path, arguments: tuple[str, ...], variables: dict[str, str], told: str
) -> None:
    done, calls = build(tmp_path, *arguments, **variables)
    assert done.returncode == 2 and calls == [] and not (tmp_path / "sources").exists()
    assert done.stderr.startswith("error: ") and told in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_command_that_fails_ends_the_build_with_its_code(tmp_path: Path) -> None:
    done, calls = build(tmp_path, FAIL_AT="sources/pytorch/requirements.txt")
    assert done.returncode == 7 and "requirements.txt" in calls[-1][-1]


@pytest.mark.skipif(
    shutil.which("shellcheck") is None, reason="the program shellcheck is not installed"
)
def test_shellcheck_has_nothing_to_say() -> None:
    done = subprocess.run(["shellcheck", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
