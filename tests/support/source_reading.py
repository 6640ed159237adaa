"""Reads a source the way the build does: units from one object, each read by another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from data_pipeline.config import AnySource
from data_pipeline.sources.interface import Document, LeftOut, ReadContext, Unit, open_source

SECTION: TypeAdapter[Any] = TypeAdapter(AnySource)


def list_units(section: dict[str, Any], unit_bytes: int = 1 << 20, **context: Any) -> list[Unit]:
    return open_source(SECTION.validate_python(section), ReadContext("all", **context)).units(
        unit_bytes
    )


def read_units(
    section: dict[str, Any], units: list[Unit], **context: Any
) -> list[Document | LeftOut]:
    source = open_source(SECTION.validate_python(section), ReadContext("all", **context))
    return [result for unit in units for result in source.read(unit)]


def read_all(
    section: dict[str, Any], unit_bytes: int = 1 << 20, **context: Any
) -> list[Document | LeftOut]:
    return read_units(section, list_units(section, unit_bytes, **context), **context)


def texts(results: list[Document | LeftOut]) -> list[str]:
    return [result.text for result in results if isinstance(result, Document)]


def left_out(results: list[Document | LeftOut]) -> list[LeftOut]:
    return [result for result in results if isinstance(result, LeftOut)]


def reasons(results: list[Document | LeftOut]) -> list[str]:
    return [result.reason for result in left_out(results)]


def write(path: Path, content: bytes | str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return str(path)


def peak_megabytes() -> int:
    """The most memory that this process held since it began its program (ru_maxrss counts what its
    parent held before that too).
    """
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) >> 10
