"""Classifies files by their names."""

from __future__ import annotations

import os
import re

from data_pipeline.sources.containers import COMPRESSED

JSONL = "jsonl"
JSON = "json"
PARQUET = "parquet"
CSV = "csv"
TSV = "tsv"
ARROW = "arrow"
TEXT = "text"
CODE = "code"
SIDE = "side"
ARCHIVE = "archive"
OTHER = "other"
# Records, as nobody writes source code.
RECORDS = (JSONL, PARQUET, CSV, TSV, ARROW)
DATA = (*RECORDS, JSON, TEXT)

LABELS = {
    JSONL: "JSON lines",
    JSON: "JSON",
    PARQUET: "Parquet",
    CSV: "CSV",
    TSV: "TSV",
    ARROW: "Arrow",
    TEXT: "text",
    CODE: "source code",
    SIDE: "side files",
    ARCHIVE: "archives",
    OTHER: "other kinds",
}
CODE_ENDINGS = """
    .ada .asm .bash .bat .c .cc .cfg .clj .cljs .cmake .coffee .cpp .cs .css .cu .cuh .cxx .d .dart
    .el .elm .erl .ex .exs .f .f90 .fs .go .gradle .graphql .groovy .h .hh .hpp .hs .html .hxx .ini
    .ipynb .java .jl .js .jsx .kt .kts .less .lisp .lua .m .mjs .ml .mli .mm .nim .php .pl .pm
    .proto .ps1 .py .pyi .pyx .r .rb .rs .s .scala .scm .scss .sh .sol .sql .sv .svelte .swift .tcl
    .tf .toml .ts .tsx .v .vb .vhd .vim .vue .xml .yaml .yml .zig .zsh
""".split()
CLASS_OF_ENDING = {
    ".jsonl": JSONL,
    ".ndjson": JSONL,
    ".json": JSON,
    ".parquet": PARQUET,
    ".csv": CSV,
    ".tsv": TSV,
    ".arrow": ARROW,
    ".arrows": ARROW,
    ".ipc": ARROW,
    ".feather": ARROW,
    **dict.fromkeys((".txt", ".text", ".md", ".rst", ".tex"), TEXT),
    **dict.fromkeys(
        (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar", ".lz4"), ARCHIVE
    ),
    **dict.fromkeys(
        (
            ".md5",
            ".sha1",
            ".sha256",
            ".sha512",
            ".crc",
            ".sig",
            ".asc",
            ".lock",
            ".cff",
            ".pdf",
            ".png",
            ".svg",
            ".bib",
        ),
        SIDE,
    ),
    **dict.fromkeys(CODE_ENDINGS, CODE),
}
# Files that accompany data, or any other files.
SIDE_NAME = re.compile(
    r"(readme([-_.]\w\w([-_]\w+)?)?|licen[cs]e([-_.](mit|apache|bsd|cc|gpl|data|code)[\w.-]*)?"
    r"|copying|notice|citation|contributing|changelog|code_of_conduct|security|authors"
    r"|data_?card|dataset_?card)(\.(md|txt|rst|html))?"
    r"|(dataset_infos?|dataset_dict|state|config|metadata|croissant|package|package-lock"
    r"|manifest)\.json"
    r"|(sha\d*sums?|md5sums?|checksums?)(\.txt)?|requirements[\w-]*\.txt|makefile|dockerfile"
    # results that the package datasets keeps among the files of a data set
    r"|cache-[0-9a-f]+(_\d+_of_\d+)?\.arrow"
    r"|_[^.]*"  # _SUCCESS, _metadata and the like of Spark and Hive
)


def ending_of(path: str) -> str:
    """The ending of a name without that of its compression, in lower case."""
    path = path.lower()
    for compressed in COMPRESSED:
        path = path.removesuffix(compressed)
    return os.path.splitext(path)[1]


def class_of(path: str) -> str:
    """Return the class of a file by its name."""
    name = path.rpartition("/")[2].lower()
    if SIDE_NAME.fullmatch(name):
        return SIDE
    ending = ending_of(name)
    if ending == ".json" and not name.endswith(ending):
        # A compressed file is not part of source code.
        return JSONL
    return CLASS_OF_ENDING.get(ending) or (ARCHIVE if name.endswith(COMPRESSED) else OTHER)


def files_of_kind(paths: list[str], kind: str) -> list[str]:
    """Return the files of a folder that a source of this kind reads, named from the folder.

    Texts are files that are named so or, if there are none, all that are neither records nor
    archives. At the top of a folder README and the like describe it; further down they are texts
    like others.
    """
    if kind == JSONL:
        return [path for path in paths if class_of(path) in (JSONL, JSON)]
    if kind != TEXT:
        return [path for path in paths if class_of(path) == kind]
    named = [path for path in paths if class_of(path) == TEXT]
    if not named:
        return [path for path in paths if class_of(path) in (CODE, OTHER)]
    described = [
        path
        for path in paths
        if class_of(path) == SIDE and "/" in path and CLASS_OF_ENDING.get(ending_of(path)) == TEXT
    ]
    return sorted(named + described)
