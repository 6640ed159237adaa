"""Guesses the kind of source from a file name, a pattern or a folder."""

from __future__ import annotations

import os
import re

from data_pipeline.sources.file_kinds import CSV, JSON, JSONL, RECORDS, TSV, class_of, ending_of
from data_pipeline.sources.files import list_files
from data_pipeline.sources.folder_walk import snapshot_of, walk
from data_pipeline.sources.folders import kind_of_folder
from pretrain.core.errors import ConfigError, DataError
from pretrain.core.files import JsonObject

STANDARD_INPUT = "-"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
DATASETS = "datasets"
# Sections by the name of what they read; for all others the name is the kind.
SECTIONS: dict[str, JsonObject] = {
    "line": {"kind": "text", "document": "line"},
    TSV: {"kind": CSV, "delimiter": "\t"},
}
NO_CHOICE = (
    "--dataset-config and --dataset-split choose a part of a folder of data or a data set, and no"
    " input is one: leave them out"
)


def sources_of(
    inputs: list[str], kind: str | None, config: str | None = None, split: str | None = None
) -> dict[str, JsonObject]:
    """Return the source sections that ``--input`` means, by name.

    Patterns of one kind are one source; each data set is one.

    Args:
        kind: of all inputs; None: by the ending of each name, and by the files of a folder.
        config, split: of the folders and data sets among the inputs.

    Raises:
        ConfigError: for a pattern or a folder whose files are of several kinds, and for a choice
            that nothing could follow.
        DataError: for a folder without data.
    """
    choice = {
        name: value
        for name, value in (("config", config), ("dataset_split", split))
        if value is not None
    }
    if STANDARD_INPUT in inputs:
        if len(inputs) > 1:
            raise ConfigError(
                "--input - reads standard input, and nothing else with it: give files, or pipe them"
                " all in"
            )
        forms = {None: "jsonl", "jsonl": "jsonl", "text": "text", "line": "line"}
        if kind not in forms:
            raise ConfigError(
                f"--format {kind} cannot be read from standard input: pipe jsonl, line or text"
            )
        if choice:
            raise ConfigError(NO_CHOICE)
        return {"stdin": {"kind": "stdin", "format": forms[kind]}}
    found: dict[str, JsonObject] = {}
    was_chosen = not choice
    for pattern in inputs:
        place = os.path.expanduser(pattern)
        is_folder = os.path.isdir(place)
        name = _name(pattern, place, kind, config)
        if name == DATASETS:
            number = sum(section["kind"] == DATASETS for section in found.values())
            found[f"{DATASETS}_{number + 1}" if number else DATASETS] = {
                "kind": DATASETS,
                "dataset": pattern,
                **choice,
            }
            was_chosen = True
            continue
        section = found.setdefault(name, dict(SECTIONS.get(name, {"kind": name})))
        section.setdefault("input", []).append(pattern)
        if is_folder and name != "source_code":
            section |= choice
            was_chosen = True
    if not was_chosen:
        raise ConfigError(NO_CHOICE)
    return found


def _name(pattern: str, place: str, kind: str | None, config: str | None) -> str:
    if kind is None:
        return kind_of_folder(place, config) if os.path.isdir(place) else _kind_of(pattern)
    if kind != CSV:
        return kind
    paths = walk(snapshot_of(place)) if os.path.isdir(place) else [f"x{ending_of(pattern)}"]
    classes = set(map(class_of, paths))
    return TSV if TSV in classes and CSV not in classes else CSV


def _kind_of(pattern: str) -> str:
    if HUB_NAME.fullmatch(pattern) and not os.path.exists(os.path.dirname(pattern)):
        raise DataError(
            f"--input {pattern} matches no file in {os.getcwd()}: check the path, or add --format"
            " datasets if the hub has it"
        )
    ending = ending_of(pattern)
    is_clear = ending.isascii() and ending[1:].isalnum()
    kinds = {_kind_by_name(path) for path in ([pattern] if is_clear else list_files([pattern]))}
    if len(kinds) > 1:
        raise ConfigError(
            f"--input {pattern} matches files of several kinds ({', '.join(sorted(kinds))}): give"
            " one pattern for each, or --format"
        )
    return kinds.pop()


def _kind_by_name(path: str) -> str:
    # A name that was given is meant, even if a file of this name usually only accompanies data.
    found = class_of(f"x{ending_of(path)}")
    if found == JSON:
        return JSONL
    return found if found in RECORDS else "text"


def limit_rows(data: JsonObject, rows: int) -> None:
    """Limit each data set of a data section, as a mapping, to its first rows.

    Raises:
        ConfigError: if there is none.
    """
    named = data.get("sources") or {"": data.get("source")}
    sections = [
        section
        for section in named.values()
        if isinstance(section, dict) and section.get("kind") == DATASETS
    ]
    if not sections:
        raise ConfigError(
            "--max-samples counts rows of data sets (kind: datasets), and no source is one: leave"
            " it out"
        )
    for section in sections:
        section["max_samples"] = rows
