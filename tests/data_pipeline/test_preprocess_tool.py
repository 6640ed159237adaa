"""tools/preprocess_data.py as a user runs it."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parent.parent.parent / "tools" / "preprocess_data.py"
SMALL = ["--input", "raw/*.txt", "--vocab-size", "300", "--output", "data/my"]
FILES = {"manifest.json", "tokenizer.json", "train.bin", "train.idx", "validation.bin", "validation.idx"}


@pytest.fixture
def work(tmp_path: Path, write_corpus: Callable[..., None]) -> Path:
    write_corpus(tmp_path / "raw")
    return tmp_path


def run(folder: Path, *options: str, limit_file_size: int | None = None) -> subprocess.CompletedProcess[str]:
    def limit() -> None:
        if limit_file_size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_file_size, limit_file_size))

    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, str(TOOL), *options]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, preexec_fn=limit, timeout=300)


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_own_text_becomes_data_from_any_folder_and_is_reused(work: Path) -> None:
    first = run(work, *SMALL)
    assert first.returncode == 0, first.stderr
    assert files_in(work / "data" / "my") == FILES
    assert "deepspeed" in first.stdout and "data.path=data/my" in first.stdout
    again = run(work, *SMALL)
    assert again.returncode == 0 and "reused" in again.stdout


def test_json_alone_on_standard_output(work: Path) -> None:
    result = json.loads(run(work, *SMALL, "--json", "-").stdout)
    manifest = json.loads((work / "data" / "my" / "manifest.json").read_text())
    assert result["splits"] == manifest["splits"]
    assert (result["folder"], result["reused"], result["tokenizer"]["vocab_size"]) == ("data/my", False, 300)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--input", "nothing/*.txt", "--output", "data"], 3, "nothing/*.txt matches no file"),
        (["--input", "raw/*.txt"], 2, "--output"),
        (["--input", "raw/*.txt", "--output", "data", "--vocab-size", "5"], 2, "data.tokenizer.vocab_size"),
        (["--input", "raw/*.txt", "--output", "data", "--validation-share", "1.5"], 2, "data.validation_share"),
        (["--input", "raw/*.txt", "--output", "data", "--set", "data.tokeniser.kind=file"], 2, "did you mean 'tokenizer'"),
        (["--input", "raw/*.txt", "--output", "data", "--tokenizer", "raw/000.txt"], 3, "raw/000.txt is not a tokenizer"),
        (["--recipe", "no-such-recipe"], 2, "no recipe 'no-such-recipe'"),
    ],
)
def test_bad_requests_end_with_a_sentence_and_a_code(work: Path, options: list[str], code: int, message: str) -> None:
    result = run(work, *options)
    assert result.returncode == code
    assert message in result.stderr and "Traceback" not in result.stderr
    assert files_in(work) == {"raw"}


def test_other_data_is_refused_until_fresh(work: Path) -> None:
    run(work, *SMALL)
    refused = run(work, *SMALL, "--validation-share", "0.4")
    assert refused.returncode == 2 and "--fresh" in refused.stderr
    assert run(work, *SMALL, "--validation-share", "0.4", "--fresh").returncode == 0


def test_a_full_disk_ends_with_code_5_and_no_partial_files(work: Path, write_corpus: Callable[..., None]) -> None:
    write_corpus(work / "raw", words=1200)
    result = run(work, *SMALL, limit_file_size=20_000)
    assert result.returncode == 5
    assert "data/my" in result.stderr and "Traceback" not in result.stderr
    assert files_in(work / "data" / "my") == set()
    assert run(work, *SMALL).returncode == 0


def test_a_full_disk_leaves_older_data_as_it_was(work: Path, write_corpus: Callable[..., None]) -> None:
    run(work, *SMALL)
    before = {path.name: path.read_bytes() for path in (work / "data" / "my").iterdir()}
    write_corpus(work / "raw", words=1200)
    assert run(work, *SMALL, "--fresh", limit_file_size=20_000).returncode == 5
    assert {path.name: path.read_bytes() for path in (work / "data" / "my").iterdir()} == before


def test_a_killed_build_has_no_manifest_and_is_built_again(work: Path, write_corpus: Callable[..., None]) -> None:
    write_corpus(work / "raw", words=9_600)
    with subprocess.Popen([sys.executable, str(TOOL), *SMALL], cwd=work, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not (work / "data" / "my" / ".building" / "train.bin.partial").exists() and time.monotonic() < deadline:
            assert process.poll() is None, "the build ended before it could be killed"
            time.sleep(0.002)
        process.kill()
    assert files_in(work / "data" / "my") == {".building"}
    assert run(work, *SMALL).returncode == 0
    assert run(work, *SMALL[:-1], "data/clean").returncode == 0
    assert (work / "data" / "my" / "manifest.json").read_bytes() == (work / "data" / "clean" / "manifest.json").read_bytes()
    assert files_in(work / "data" / "my") == FILES
