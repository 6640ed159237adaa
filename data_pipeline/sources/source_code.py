"""Folders of source code: a document is a file."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.sources.config import SourceCodeSource
from data_pipeline.sources.files import check_names, distinct, grouped_units, unreadable
from data_pipeline.sources.folder_walk import is_pointer
from data_pipeline.sources.interface import BYTE_ORDER_MARK, Document, LeftOut, Source, Unit
from data_pipeline.sources.records import text_fault
from pretrain.core.errors import DataError

if TYPE_CHECKING:
    from pathspec import GitIgnoreSpec


class SourceCode(Source[SourceCodeSource]):
    """A document's name is its path below the folder, behind the folder's name as given.

    The .gitignore files of the folder and of those inside it hold, with git's rules; those above it
    do not. ``.git`` is never entered. Symbolic links are not followed: what they reach inside the
    folder is read at its own place, and what is outside is not asked for.
    """

    def units(self, unit_bytes: int) -> list[Unit]:
        found = [path for pattern in self.config.input for path in self._matches(pattern)]
        if not found:
            wanted = (
                f" that ends in {', '.join(self.config.suffixes)}" if self.config.suffixes else ""
            )
            raise DataError(
                f"{', '.join(self.config.input)} holds no file{wanted}: check the folder,"
                " 'suffixes' and .gitignore"
            )
        return grouped_units(self.context.name, distinct(check_names(found)), unit_bytes)

    def _matches(self, pattern: str) -> Iterator[str]:
        literal = os.path.expanduser(pattern)
        places = (
            [literal] if os.path.exists(literal) else sorted(glob.glob(literal, recursive=True))
        )
        if not places:
            raise DataError(
                f"--input {pattern} matches nothing in {Path.cwd()}: check the path or the pattern"
            )
        for place in places:
            root = Path(place).as_posix()
            files = walk(root, self.config.respect_gitignore) if os.path.isdir(root) else [root]
            yield from (
                path
                for path in files
                if self.config.suffixes is None or path.endswith(tuple(self.config.suffixes))
            )

    def read(self, unit: Unit) -> Iterator[Document | LeftOut]:
        for path in unit.files:
            try:
                with open(path, "rb") as stream:
                    content = stream.read(
                        min(self.config.max_file_bytes, self.context.max_record_bytes) + 1
                    )
            except OSError as error:
                raise unreadable(path, error) from None
            yield self._document(path, content)

    def _document(self, path: str, content: bytes) -> Document | LeftOut:
        if len(content) > self.config.max_file_bytes:
            return LeftOut(
                path,
                "too_large",
                detail=f"larger than {self.config.max_file_bytes} bytes",
                is_bad=False,
            )
        if len(content) > self.context.max_record_bytes:
            return LeftOut(
                path, "too_long", detail=f"longer than {self.context.max_record_bytes} bytes"
            )
        if is_pointer(content):
            return LeftOut(path, "git_lfs_pointer", is_bad=False)
        if b"\0" in content:
            return LeftOut(path, "binary", is_bad=False)
        try:
            text = content.removeprefix(BYTE_ORDER_MARK).decode("utf-8")
        except UnicodeDecodeError as error:
            return LeftOut(path, "invalid_utf8", detail=f"at byte {error.start}")
        fault = text_fault(text, "text")
        return (
            LeftOut(path, fault[0], detail=fault[1], is_bad=fault[0] != "empty")
            if fault
            else Document(text, path, file=path)
        )


def walk(root: str, respect_gitignore: bool) -> Iterator[str]:
    """Yield files below a folder as ``root/...``, sorted by name in each folder.

    Files that .gitignore names are left out.

    Raises:
        DataError: for a folder that cannot be listed.
    """
    yield from _walk(root, [] if respect_gitignore else None)


def _walk(folder: str, rules: list[tuple[str, GitIgnoreSpec]] | None) -> Iterator[str]:
    """``rules`` are those of the folders above with their paths, the nearest last.

    None if .gitignore files do not count.
    """
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise unreadable(folder, error) from None
    if rules is not None and any(
        entry.name == ".gitignore" and entry.is_file(follow_symlinks=False) for entry in entries
    ):
        rules = [*rules, (folder, _read_rules(os.path.join(folder, ".gitignore")))]
    for entry in entries:
        is_folder = entry.is_dir(follow_symlinks=False)
        path = f"{folder}/{entry.name}" if folder != "/" else f"/{entry.name}"
        if (
            entry.name == ".git"
            or not (is_folder or entry.is_file(follow_symlinks=False))
            or _is_ignored(path, is_folder, rules or [])
        ):
            continue
        if is_folder:
            yield from _walk(path, rules)
        else:
            yield path


def _read_rules(path: str) -> GitIgnoreSpec:
    from pathspec import GitIgnoreSpec

    try:
        lines = Path(path).read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError as error:
        raise unreadable(path, error) from None
    try:
        return GitIgnoreSpec.from_lines(lines)
    except ValueError as error:
        raise DataError(
            f"{path} holds a rule that git would not know ({error}): fix it, or set"
            " respect_gitignore: false"
        ) from None


def _is_ignored(path: str, is_folder: bool, rules: list[tuple[str, GitIgnoreSpec]]) -> bool:
    """Whether the last matching rule of the nearest .gitignore excludes a path.

    It is never called for paths inside an ignored folder.
    """
    for folder, spec in reversed(rules):
        inside = path.removeprefix(folder).lstrip("/") + ("/" if is_folder else "")
        for rule in reversed(spec.patterns):
            found = rule.match_file(inside) if rule.include is not None else None
            if found and _names(found.match, inside):
                return bool(rule.include)
    return False


def _names(found: re.Match[str], path: str) -> bool:
    """Whether a rule names the path itself.

    It does not name a/b as ``a`` does, by a folder above it, nor as ``a/**`` does for a, by its
    content.
    """
    # A rule has one group: the slash behind a folder that it names.
    if found.lastindex is not None:
        return found.end(found.lastindex) == len(path)
    return not (path.endswith("/") and found.end() == len(path))
