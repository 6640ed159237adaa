"""Which kind of source a file name or pattern stands for."""

from __future__ import annotations

import os
from typing import Any

from data_pipeline.sources.files import COMPRESSED, list_files
from pretrain.config.errors import ConfigError

STANDARD_INPUT = "-"
KIND_OF_ENDING = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}


def sources_of(inputs: list[str], kind: str | None) -> dict[str, dict[str, Any]]:
    """The source sections that ``--input`` means, by name; patterns of one kind are one source.

    Args:
        kind: of all inputs; None: by the ending of each name, a folder being source code.

    Raises:
        ConfigError: for a pattern whose files are of several kinds.
    """
    if STANDARD_INPUT in inputs:
        if len(inputs) > 1:
            raise ConfigError("--input - reads standard input, and nothing beside it: give files, or pipe them all in")
        forms = {None: "jsonl", "jsonl": "jsonl", "text": "text", "line": "line"}
        if kind not in forms:
            raise ConfigError(f"--format {kind} cannot be read from standard input: pipe jsonl, line or text")
        return {"stdin": {"kind": "stdin", "format": forms[kind]}}
    found: dict[str, dict[str, Any]] = {}
    for pattern in inputs:
        name = kind or _kind_of(pattern)
        section = found.setdefault(name, {"kind": "text", "document": "line"} if name == "line" else {"kind": name})
        section.setdefault("input", []).append(pattern)
        if name == "csv" and _ending(pattern) == ".tsv":
            section["delimiter"] = "\t"
    return found


def _kind_of(pattern: str) -> str:
    if os.path.isdir(os.path.expanduser(pattern)):
        return "source_code"
    ending = _ending(pattern)
    kinds = {KIND_OF_ENDING.get(ending, "text")} if ending.isascii() and ending[1:].isalnum() else set()
    kinds = kinds or {KIND_OF_ENDING.get(_ending(path), "text") for path in list_files([pattern])}
    if len(kinds) > 1:
        raise ConfigError(f"--input {pattern} matches files of several kinds ({', '.join(sorted(kinds))}): give one pattern for each, or --format")
    return kinds.pop()


def _ending(path: str) -> str:
    for compressed in COMPRESSED:
        path = path.removesuffix(compressed)
    return os.path.splitext(path)[1].lower()
