"""Fixtures of small corpora, and of a data folder built of one."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from data_pipeline.config import DataConfig

if TYPE_CHECKING:  # the build is slow to import, and most tests do not need it
    from data_pipeline.preprocess.coordinator import BuildResult

WORDS = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "epsilon",
    "zeta",
    "eta",
    "theta",
    "iota",
    "kappa",
    "λάμδα",
    "mü",
    "中文",
    "<|endoftext|>",
]

WriteCorpus = Callable[..., None]
TextConfig = Callable[..., DataConfig]


@pytest.fixture(scope="session")
def write_corpus() -> WriteCorpus:
    """Writes text files of random words, a dozen a line."""

    def write(folder: Path, documents: int = 40, words: int = 60, seed: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        source = random.Random(seed)
        for number in range(documents):
            lines = [" ".join(source.choices(WORDS, k=12)) for _ in range(words // 12)]
            (folder / f"{number:03}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")

    return write


@pytest.fixture(scope="session")
def text_config() -> TextConfig:
    """The data section for text files, with a tokenizer trained on them or a given one."""

    def make(
        pattern: str,
        vocab_size: int | None = 300,
        validation_share: float = 0.2,
        tokenizer: Path | None = None,
    ) -> DataConfig:
        chosen = (
            {"kind": "train_bpe"} if tokenizer is None else {"kind": "file", "path": str(tokenizer)}
        )
        source = {"kind": "text", "input": [pattern]}
        return DataConfig.model_validate(
            {
                "source": source,
                "tokenizer": chosen | {"vocab_size": vocab_size},
                "validation_share": validation_share,
            }
        )

    return make


@pytest.fixture(scope="session")
def built(
    tmp_path_factory: pytest.TempPathFactory, write_corpus: WriteCorpus, text_config: TextConfig
) -> BuildResult:
    """A data folder of forty documents; tests only read it."""
    folder = tmp_path_factory.mktemp("built")
    write_corpus(folder / "raw")
    from data_pipeline.preprocess.coordinator import build
    from data_pipeline.preprocess.workspace import Output

    return build(text_config(str(folder / "raw" / "*.txt")), Output(folder / "data"))
