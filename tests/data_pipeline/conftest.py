"""Small real corpora and data folders."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from data_pipeline.build import BuildResult, build
from pretrain.config.schema import DataConfig

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "λάμδα", "mü", "中文", "<|endoftext|>"]


def write_corpus(folder: Path, documents: int, words: int = 60, seed: int = 0) -> None:
    """Text files of random words, a dozen a line."""
    folder.mkdir(parents=True, exist_ok=True)
    source = random.Random(seed)
    for number in range(documents):
        lines = [" ".join(source.choices(WORDS, k=12)) for _ in range(words // 12)]
        (folder / f"{number:03}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def text_config(pattern: str, vocab_size: int = 300, validation_share: float = 0.2) -> DataConfig:
    return DataConfig.model_validate(
        {
            "source": {"kind": "text", "input": [pattern]},
            "tokenizer": {"kind": "train_bpe", "vocab_size": vocab_size},
            "validation_share": validation_share,
        }
    )


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> BuildResult:
    """A data folder of forty documents; tests only read it."""
    folder = tmp_path_factory.mktemp("built")
    write_corpus(folder / "raw", documents=40)
    return build(text_config(str(folder / "raw" / "*.txt")), folder / "data")
