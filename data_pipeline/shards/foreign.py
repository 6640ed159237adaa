"""Token files that other programs have written, as documents of token ids.

========== ============================================
========================================================== form       files
documents ========== ============================================
========================================================== Megatron   ``P.bin``, ``P.idx``
(GPT-NeoX's are equal)  marks in the index, of one sequence or several each nanotron   ``P.ds``,
``P.ds.index``, ``.ds.metadata``   ends in the index: uint64, in tokens (datatrove's writer) nanoGPT
``P.bin``: uint16, nothing else              at the end-of-document token llm.c      ``P.bin``: 256
int32 (magic, version,        before each end-of-document token, which begins a document
           tokens), then uint16 or uint32               there
========== ============================================
==========================================================
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.shards.indexed import IndexedReader, Tokens, bin_path, idx_path
from data_pipeline.shards.token_stream import ReadFile
from pretrain.core.errors import DataError

REMEDY = "copy it again from where it is whole, or write it again with the program that made it"
READ_TOKENS = 1 << 20
LLM_C_HEADER = np.dtype("<i4"), 256
# Magic number and version of each token type (llm.c, dev/data/data_common.py).
LLM_C_TYPES: dict[tuple[int, int], np.dtype[Any]] = {
    (20240520, 1): np.dtype("<u2"),
    (20240801, 7): np.dtype("<u4"),
}
# A plain file of 4-byte ids, read as 2-byte ones, has a zero in every second place.
PLAIN_SAMPLE = 1 << 12


@dataclass(frozen=True)
class ForeignShard:
    """Tokens back to back in a file.

    Attributes:
        prefix: as it was given.
        path, offset: the file of the tokens, and the bytes before the first one.
        ends: tokens before the end of each document, int64, sorted; None if only the tokens say
            it.
        files: all that are read.
        sequences: of an index that counts them apart from documents.
        notes: what is in the files and not taken over, one sentence each.
    """

    prefix: str
    form: str
    path: Path
    dtype: np.dtype[Any]
    num_tokens: int
    ends: np.ndarray | None
    files: list[Path]
    offset: int = 0
    sequences: int | None = None
    notes: list[str] = field(default_factory=list)

    def read(self, begin: int, end: int) -> Tokens:
        """Tokens begin .. end - 1; read, not mapped, so that memory stays flat."""
        return ReadFile(self.path).read(
            self.offset + begin * self.dtype.itemsize, end - begin, self.dtype
        )

    def parts(self, begin: int, end: int) -> Iterator[Tokens]:
        """The same in parts of ``READ_TOKENS``."""
        for start in range(begin, end, READ_TOKENS):
            yield self.read(start, min(start + READ_TOKENS, end))

    @property
    def is_whole_file(self) -> bool:
        """Whether the file holds these tokens and nothing else."""
        return self.path.stat().st_size == self.num_tokens * self.dtype.itemsize

    def part_of_documents(self, ends: np.ndarray, first: int, last: int) -> ForeignShard:
        """Return documents first .. last - 1 as a shard, by the ends of all documents."""
        begin, end = (int(ends[number - 1]) if number else 0 for number in (first, last))
        return replace(
            self,
            num_tokens=end - begin,
            ends=ends[first:last] - begin,
            offset=self.offset + begin * self.dtype.itemsize,
        )

    def document_ends(self, eod_id: int | None) -> np.ndarray:
        """Return ``ends``, or the ends that the end-of-document tokens imply.

        A document begins at each such token if the first token is one; otherwise it ends behind
        each.
        """
        if self.ends is not None:
            return self.ends
        if eod_id is None:
            raise DataError(
                f"{self.path} has no index, and the tokenizer no token that ends a document, so"
                " that nothing says where documents end: name the token with"
                " data.tokenizer.eod_token"
            )
        found = [np.zeros(0, np.int64)]
        start = 0
        before = False
        for part in self.parts(0, self.num_tokens):
            before = bool(part[0] == eod_id) if start == 0 else before
            found.append(np.flatnonzero(part == eod_id) + start + (0 if before else 1))
            start += len(part)
        ends = np.concatenate(found)
        ends = ends[ends > 0]  # the token that begins the first document ends none
        return (
            ends if len(ends) and ends[-1] == self.num_tokens else np.append(ends, self.num_tokens)
        )


def open_foreign(prefix: str) -> ForeignShard:
    """The shard of a prefix, or of the name of one of its files.

    Raises:
        DataError: if there is none, or it is damaged or of a form that is not known; it names
            the file.
    """
    path = Path(prefix)
    if path.is_dir():
        raise DataError(
            f"{path} is a folder: name the shards in it, such as {path}/*.ds, or the prefixes of"
            " .bin/.idx pairs"
        )
    base = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    if idx_path(base).exists() or path.suffix == ".idx":
        return _megatron(prefix, base)
    if (
        path.name.endswith((".ds", ".ds.index", ".ds.metadata"))
        or path.with_name(path.name + ".ds").exists()
    ):
        name = path.name.removesuffix(".index").removesuffix(".metadata").removesuffix(".ds")
        return _nanotron(prefix, path.with_name(name + ".ds"))
    if bin_path(base).exists():
        if path.suffix != ".bin":
            raise DataError(
                f"{idx_path(base)} is missing: {REMEDY}; if the file is nanoGPT's or llm.c's, which"
                f" has none, name it as {bin_path(base)}"
            )
        return _plain(prefix, path)
    raise DataError(
        f"there are no shards {prefix}: neither {prefix}.bin and .idx (Megatron, GPT-NeoX),"
        f" {prefix}.ds (nanotron) nor {prefix}.bin"
    )


def _megatron(prefix: str, base: Path) -> ForeignShard:
    reader = IndexedReader(base, REMEDY)
    reader.check()
    notes = []
    if reader.sequence_modes is not None and reader.sequence_modes.any():
        count = int(np.count_nonzero(reader.sequence_modes))
        notes.append(
            f"{count:,} of {len(reader):,} sequences of {prefix} have another mode than 0: they are"
            " taken as tokens, modes are not kept"
        )
    if reader.num_documents != len(reader):
        notes.append(
            f"{prefix} has {len(reader):,} sequences in {reader.num_documents:,} documents: those"
            " of a document become one"
        )
    files = [bin_path(base), idx_path(base)]
    return ForeignShard(
        prefix,
        "Megatron",
        bin_path(base),
        reader.dtype,
        reader.num_tokens,
        reader.document_ends(),
        files,
        sequences=len(reader),
        notes=notes,
    )


def _nanotron(prefix: str, path: Path) -> ForeignShard:
    index = path.with_name(path.name + ".index")
    metadata = path.with_name(path.name + ".metadata")
    for needed in (path, index):
        if not needed.is_file():
            raise DataError(
                f"{needed} is missing: {REMEDY}; the tokens of a nanotron shard are in .ds, the"
                " ends of its documents in .ds.index"
            )
    size = path.stat().st_size
    index_size = index.stat().st_size
    if index_size % 8:
        raise DataError(
            f"{index} has {index_size} bytes, which is no number of 8-byte document ends: {REMEDY}"
        )
    ends = np.fromfile(index, "<u8").astype(np.int64)
    if (np.diff(ends, prepend=0) < 0).any():
        raise DataError(
            f"{index} is damaged: document {int((np.diff(ends, prepend=0) < 0).argmax())} ends"
            f" before the one in front of it; {REMEDY}"
        )
    tokens = int(ends[-1]) if len(ends) else 0
    width = next((width for width in (2, 4) if tokens * width == size), None)
    if width is None:
        raise DataError(
            f"{path} has {size} bytes, but its index ends at {tokens} tokens, which need"
            f" {2 * tokens} or {4 * tokens}: {REMEDY}"
        )
    if metadata.is_file():
        _check_metadata(metadata, tokens, width)
    notes = []
    if path.with_name(path.name + ".loss").exists():
        notes.append(f"the loss mask {path.name}.loss is not kept: every token is trained on")
    return ForeignShard(
        prefix, "nanotron", path, np.dtype(f"<u{width}"), tokens, ends, [path, index], notes=notes
    )


def _check_metadata(path: Path, tokens: int, width: int) -> None:
    """Compare the lines of a ``.metadata`` file with the index.

    They are the tokenizer's name (in newer files also the bytes of a token), the number of tokens,
    and the same number abbreviated.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    said_width = lines[0].rpartition("|")[2] if lines and "|" in lines[0] else str(width)
    said_tokens = lines[1] if len(lines) > 1 else str(tokens)
    if (said_width, said_tokens) != (str(width), str(tokens)):
        raise DataError(
            f"{path} says {said_tokens} tokens of {said_width} bytes, index and file size say"
            f" {tokens} of {width}: {REMEDY}"
        )


def _plain(prefix: str, path: Path) -> ForeignShard:
    """A .bin without an index: llm.c's if it begins with its header, else nanoGPT's."""
    size, (kind, count) = path.stat().st_size, LLM_C_HEADER
    header = np.fromfile(path, kind, count)
    if len(header) == count and header[0] in {magic for magic, _ in LLM_C_TYPES}:
        dtype = LLM_C_TYPES.get((int(header[0]), int(header[1])))
        if dtype is None:
            raise DataError(
                f"{path} has llm.c's header with version {header[1]}, which is not known: write it"
                " again with a current llm.c"
            )
        tokens = int(header[2])
        needed = header.nbytes + tokens * dtype.itemsize
        if tokens < 0 or needed != size:
            raise DataError(
                f"{path} has {size} bytes, but {tokens} tokens and llm.c's header need {needed}:"
                f" {REMEDY}"
            )
        return ForeignShard(
            prefix, "llm.c", path, dtype, tokens, None, [path], offset=header.nbytes
        )
    if size % 2:
        raise DataError(
            f"{path} has {size} bytes, which is no number of uint16 tokens, and {path.stem}.idx is"
            f" missing: {REMEDY}"
        )
    sample = np.fromfile(path, "<u2", PLAIN_SAMPLE)
    if len(sample) >= 16 and not sample[1::2].any():
        raise DataError(
            f"{path} looks like tokens of 4 bytes without an index, which no known form has: write"
            " them with an index, as Megatron does"
        )
    return ForeignShard(prefix, "nanoGPT", path, np.dtype("<u2"), size // 2, None, [path])
