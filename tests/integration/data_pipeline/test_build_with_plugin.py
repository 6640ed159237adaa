"""Builds with kinds of a plugin: what a correction of its code makes of a half-built folder, and
kinds that do not do what their family asks for.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.paths import ROOT, TOOLS

RULE = """
from typing import ClassVar, Literal
from data_pipeline.cleaning.config import CleaningRule
from data_pipeline.cleaning.stage import Cleaned
from pretrain.core.errors import DataError

class Change(CleaningRule):
    implementation: ClassVar[str] = "parts:Changed"
    kind: Literal["change"]

class Changed:
    def __init__(self, config):
        pass

    def __call__(self, text):
        {body}
"""
UNFINISHED = """if "stop" in text:
            raise DataError("the rule does not know this text")
        return Cleaned(text.lower())"""
CORRECTED = "return Cleaned(text.upper())"
TOKENIZERS = """
from typing import ClassVar, Literal
from data_pipeline.tokenizer.config import TokenizerConfig, TrainBPE, TrainedTokenizer
from data_pipeline.tokenizer.training import train_bpe

class Careless(TrainedTokenizer):
    implementation: ClassVar[str] = "parts:train"
    kind: Literal["careless"]

def train(texts, config):
    return train_bpe(texts, TrainBPE(vocab_size=config.vocab_size))

class Neither(TokenizerConfig):
    implementation: ClassVar[str] = "parts:train"
    kind: Literal["neither"]
"""


@pytest.fixture
def work(tmp_path: Path, write_corpus: Callable[..., None]) -> Path:
    write_corpus(tmp_path / "raw")
    with (tmp_path / "raw" / "030.txt").open("a") as stream:
        stream.write("stop\n")
    return tmp_path


def run(folder: Path, output: str, *options: str) -> subprocess.CompletedProcess[str]:
    """A build of raw/ in several units by one process, with the plugin ``parts``."""
    fixed = ["--input", "raw/*.txt", "--workers", "1", "--set", "data.unit_bytes=2000"]
    return subprocess.run(
        [
            *(sys.executable, str(TOOLS / "preprocess_data.py"), "--plugin", "parts"),
            *(*fixed, "--output", output, *options),
        ],
        cwd=folder,
        # Two versions of a module within a second may have one size: no bytecode is kept.
        env=os.environ | {"PYTHONPATH": f"{folder}:{ROOT}", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def finished(folder: Path) -> dict[Path, int]:
    """The finished units of a half-built folder, with the times when they were written."""
    return {path: path.stat().st_mtime_ns for path in folder.glob(".building/*/*/record.json")}


def test_a_corrected_rule_is_not_mixed_with_its_old_version(work: Path) -> None:
    rule = ("--vocab-size", "300", "--set", "data.cleaning.rules=[{kind: change}]")
    (work / "parts.py").write_text(RULE.format(body=UNFINISHED))
    stopped = run(work, "data", *rule)
    assert stopped.returncode == 3 and "does not know this text" in stopped.stderr
    before = finished(work / "data")
    assert before
    # The same code continues, with --fresh too: that is about the finished data.
    again = run(work, "data", *rule, "--fresh")
    assert again.returncode == 3 and "is removed" not in again.stderr
    assert finished(work / "data") == before

    (work / "parts.py").write_text(RULE.format(body=CORRECTED))
    corrected = run(work, "data", *rule)
    assert corrected.returncode == 0, corrected.stderr
    assert "an unfinished build by other code of its plugins" in corrected.stderr
    assert run(work, "clean", *rule).returncode == 0
    files = {path.name: path.read_bytes() for path in (work / "data").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (work / "clean").iterdir()}
    assert b"plugins_sha256" not in files["manifest.json"]


def test_the_recipe_decides_how_documents_end_whatever_a_training_returns(work: Path) -> None:
    (work / "parts.py").write_text(TOKENIZERS)
    section = "data.tokenizer={kind: careless, vocab_size: 300, append_eod: false}"
    done = run(work, "data", "--set", section)
    assert done.returncode == 0, done.stderr
    assert (
        json.loads((work / "data" / "manifest.json").read_text())["tokenizer"]["append_eod"]
        is False
    )


def test_a_tokenizer_that_is_neither_loaded_nor_trained_is_refused(work: Path) -> None:
    (work / "parts.py").write_text(TOKENIZERS)
    done = run(work, "data", "--set", "data.tokenizer={kind: neither}")
    assert done.returncode == 2, done.stderr
    assert "the tokenizer kind 'neither' is neither loaded nor trained" in done.stderr
    assert "Traceback" not in done.stderr and not (work / "data").exists()
