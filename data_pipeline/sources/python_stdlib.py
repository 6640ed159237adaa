"""The standard library of the running interpreter: a corpus of real code that every machine has."""

from __future__ import annotations

import os
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.sources.config import PythonStdlibSource
from data_pipeline.sources.files import grouped_units, unreadable
from data_pipeline.sources.interface import Document, LeftOut, Source, Unit
from data_pipeline.sources.records import text_fault
from pretrain.core.errors import DataError

# Tests repeat themselves, and installed packages differ between machines.
SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "_bundled",
}
# These hold the paths and compiler flags of the one machine that built this interpreter.
BUILD_PREFIXES = ("_sysconfigdata", "config-")


class PythonStdlib(Source[PythonStdlibSource]):
    """The modules without their tests; a document's name is its path inside the library."""

    def units(self, unit_bytes: int) -> list[Unit]:
        root = stdlib_folder()
        files = sorted(path.relative_to(root).as_posix() for path in _python_files(root))
        if not files:
            raise DataError(
                f"there are no Python modules in {root}: this interpreter carries its library"
                " elsewhere; give your own text with --input"
            )
        return grouped_units(self.context.name, [str(root / name) for name in files], unit_bytes)

    def path_of(self, file: str) -> str:
        """A module's path inside the library, wherever that is on this machine."""
        return Path(file).relative_to(stdlib_folder()).as_posix()

    def read(self, unit: Unit) -> Iterator[Document | LeftOut]:
        root = stdlib_folder()
        for path in unit.files:
            name = Path(path).relative_to(root).as_posix()
            try:
                # tokenize.open honours each module's own encoding declaration.
                with tokenize.open(path) as stream:
                    text = stream.read()
            except (SyntaxError, UnicodeError):
                yield LeftOut(name, "undecodable")
                continue
            except OSError as error:
                raise unreadable(path, error) from None
            fault = text_fault(text, "text")
            yield (
                LeftOut(name, fault[0], detail=fault[1], is_bad=fault[0] != "empty")
                if fault
                else Document(text, name, file=path)
            )


def stdlib_folder() -> Path:
    """Return the folder of the running interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def _python_files(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [
            name
            for name in subfolders
            if name not in SKIPPED_FOLDERS and not name.startswith(BUILD_PREFIXES)
        ]
        yield from (
            Path(folder, name)
            for name in names
            if name.endswith(".py") and not name.startswith(BUILD_PREFIXES)
        )
