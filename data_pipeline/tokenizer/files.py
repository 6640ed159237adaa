"""The names of a tokenizer's file, and which kind a content is."""

from __future__ import annotations

from pathlib import Path

JSON_NAME = "tokenizer.json"
MODEL_NAME = "tokenizer.model"
FILE_NAMES = (JSON_NAME, MODEL_NAME)


def tokenizer_file(folder: Path) -> Path:
    """Return the path of the tokenizer in a checkpoint or an export.

    It is that of a SentencePiece model only if there is one and no ``tokenizer.json``.
    """
    found = (folder / name for name in FILE_NAMES if (folder / name).is_file())
    return next(found, folder / JSON_NAME)


def name_of(content: bytes) -> str:
    """Return what a file with this content is called."""
    return MODEL_NAME if is_sentencepiece(content) else JSON_NAME


def same_kind_of(path: Path) -> str:
    """Return what a copy of this file is called, whatever stands before its name."""
    return MODEL_NAME if path.name.endswith(MODEL_NAME) else JSON_NAME


def is_sentencepiece(content: bytes) -> bool:
    """Whether a content is a SentencePiece model, not JSON."""
    # A protocol buffer begins with the number and kind of its first field, JSON with a brace.
    return content[:1] == b"\n" and not content.lstrip().startswith(b"{")
