"""The header of an .idx file: its layout, and the checks before anything else is read."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.core.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
OLDER_MAGIC = b"TNTIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
TOKEN_TYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
FLOAT_CODES = {6: "float64", 7: "float32"}


def read_header(path: Path, remedy: str) -> tuple[np.dtype[Any], int, int]:
    """Return the token type, the number of sequences and the number of document marks.

    The counts are checked against the file's size, so that no damaged header makes a reader
    allocate or map too much.

    Args:
        remedy: what to do about a damaged file, for the error's sentence.

    Raises:
        DataError: for a file that is no such index, or damaged.
    """
    with path.open("rb") as stream:
        head = stream.read(HEADER.size)
    if head.startswith(OLDER_MAGIC):
        raise DataError(
            f"{path} is an index of the older kind TNTIDX (--dataset-impl lazy or cached), which"
            " cannot be mapped: write the shards again with --dataset-impl mmap, or tokenize the"
            " text with tools/preprocess_data.py"
        )
    if head[: len(MAGIC)] != MAGIC:
        raise DataError(
            f"{path} is not an index in Megatron's format (it does not begin with MMIDIDX): give"
            " the prefix of a .bin/.idx pair"
        )
    if len(head) < HEADER.size:
        raise DataError(
            f"{path} is damaged: it ends after {len(head)} bytes, inside its header; {remedy}"
        )
    _, version, code, sequences, marks = HEADER.unpack(head)
    if version != VERSION:
        raise DataError(
            f"{path} has index version {version}, this reader knows version {VERSION}: write it"
            " again with tools/preprocess_data.py"
        )
    if code not in TOKEN_TYPES:
        what = (
            f"{FLOAT_CODES[code]} numbers, not token ids"
            if code in FLOAT_CODES
            else f"an unknown token type (code {code})"
        )
        raise DataError(f"{path} announces {what}: write it again with tools/preprocess_data.py")
    # A multimodal data set has one more byte for each sequence.
    expected = HEADER.size + 12 * sequences + 8 * marks
    found = path.stat().st_size
    if found not in (expected, expected + sequences):
        raise DataError(
            f"{path} is damaged: it has {found} bytes, but {sequences} sequences and {marks}"
            f" document marks need {expected}, or {expected + sequences} with modes; {remedy}"
        )
    if marks == 0:
        raise DataError(f"{path} is damaged: it has no document marks; {remedy}")
    return TOKEN_TYPES[code], sequences, marks
