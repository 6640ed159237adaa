"""Where documents come from: each kind of source is a sorted list of files and a way to read one."""

from __future__ import annotations

import glob
import os
import sysconfig
import tokenize
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pretrain.config.errors import ConfigError, DataError
from pretrain.config.schema import PythonStdlibSource, TextSource

# Tests repeat themselves, and installed packages differ between machines.
STDLIB_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled"}
# These hold the paths and compiler flags of the one machine that built this interpreter.
STDLIB_BUILD_PREFIXES = ("_sysconfigdata", "config-")


@dataclass(frozen=True)
class Document:
    """One text. ``id`` is stable: it decides the split, whatever else the corpus holds."""

    text: str
    source: str
    id: str


class SkippedFile(Exception):
    """A file that is left out; the message is the reason that the manifest counts."""


class FileSource(ABC):
    """A source of one document a file.

    Attributes:
        kind: the name that the recipe and the manifest use.
        files: (document id, path), sorted by id.
    """

    kind: str
    files: list[tuple[str, Path]]

    @abstractmethod
    def read(self, path: Path) -> str:
        """The text of one file; raises SkippedFile to leave it out, DataError to stop."""

    def documents(self, skipped: Counter[str] | None = None) -> Iterator[Document]:
        """Reads the files in order; adds to ``skipped`` how many were left out for which reason."""
        for document_id, path in self.files:
            try:
                text = self.read(path)
                if not text.strip():
                    raise SkippedFile("empty")
            except SkippedFile as reason:
                if skipped is not None:
                    skipped[str(reason)] += 1
                continue
            yield Document(text, self.kind, document_id)


class PythonStdlib(FileSource):
    """The modules of the running interpreter's standard library, without its tests."""

    kind = "python_stdlib"

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or Path(sysconfig.get_path("stdlib"))
        self.files = sorted((path.relative_to(self.root).as_posix(), path) for path in _python_files(self.root))
        if not self.files:
            raise DataError(
                f"there are no Python modules in {self.root}: this interpreter carries its library elsewhere; give your own text with --input"
            )

    def read(self, path: Path) -> str:
        try:
            with tokenize.open(path) as stream:  # honours each module's own encoding declaration
                text = stream.read()
            text.encode("utf-8")
        except (SyntaxError, UnicodeError):
            raise SkippedFile("undecodable") from None
        except OSError:
            raise SkippedFile("unreadable") from None
        return text


class TextFiles(FileSource):
    """The user's own files; a document's id is its path as the pattern gave it."""

    kind = "text"

    def __init__(self, patterns: list[str], encoding: str = "utf-8") -> None:
        self.patterns, self.encoding = patterns, encoding
        self.files = sorted({path.as_posix(): path for pattern in patterns for path in _matches(pattern)}.items())

    def read(self, path: Path) -> str:
        try:
            # newline="" keeps the file's own line ends, so that bits per byte are counted over the bytes that are there.
            with path.open(encoding=self.encoding, newline="") as stream:
                text = stream.read()
            text.encode("utf-8")
        except UnicodeError as error:
            position = f" at byte {error.start}" if isinstance(error, UnicodeDecodeError) else ""
            raise DataError(
                f"{path} is not {self.encoding} text{position}: convert it, or name its encoding with --set data.source.encoding=..."
            ) from None
        except LookupError:
            raise ConfigError(f"data.source.encoding: Python knows no encoding '{self.encoding}': use utf-8, latin-1, utf-16 ...") from None
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}; make it readable or leave it out of --input") from None
        return text


def open_source(config: PythonStdlibSource | TextSource) -> PythonStdlib | TextFiles:
    """The source that a recipe's ``data.source`` describes; its files are listed, none is read yet."""
    match config:
        case PythonStdlibSource():
            return PythonStdlib()
        case TextSource(input=patterns, encoding=encoding):
            return TextFiles(patterns, encoding)


def _python_files(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in STDLIB_SKIPPED_FOLDERS and not name.startswith(STDLIB_BUILD_PREFIXES)]
        yield from (Path(folder, name) for name in names if name.endswith(".py") and not name.startswith(STDLIB_BUILD_PREFIXES))


def _matches(pattern: str) -> list[Path]:
    literal = Path(pattern).expanduser()
    if literal.is_file():
        return [literal]
    if literal.is_dir():
        raise DataError(f"--input {pattern} is a folder: say which files of it, such as '{pattern.rstrip('/')}/**/*.txt'")
    found = [path for path in map(Path, glob.glob(str(literal), recursive=True)) if path.is_file()]
    if not found:
        raise DataError(f"--input {pattern} matches no file in {Path.cwd()}: check the path or the pattern")
    return found
