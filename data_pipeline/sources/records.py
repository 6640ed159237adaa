"""From a parsed record to a document: fields by name, and what a text must be."""

from __future__ import annotations

import codecs
import difflib
from collections.abc import Iterable
from typing import Any

from data_pipeline.sources.config import RecordsBase
from data_pipeline.sources.files import one_line
from data_pipeline.sources.interface import Document, LeftOut, Source, Unit
from pretrain.core.errors import DataError
from pretrain.core.files import JsonObject

ABSENT: Any = object()

# Names that data sets give to the text; they are suggested, never taken.
USUAL_TEXT_FIELDS = (
    "text",
    "content",
    "body",
    "raw_content",
    "document",
    "article",
    "markdown",
    "code",
    "completion",
)
NAMES_SHOWN = 12
NAME_DEPTH = 3
# At least one of this many records must have a text.
FIRST_RECORDS = 10_000


class RecordReader:
    """From a parsed record to a document, or to (reason, detail).

    A field's name is first looked up as it is, then as a path: ``a.b`` is the field "a.b" if there
    is one, else b inside a. Of several paths the one with the longest first name counts, so a.b.c
    is c inside "a.b" before it is "b.c" inside a.
    """

    def __init__(self, config: RecordsBase) -> None:
        self.text_field = config.text_field
        self.id_field = config.id_field
        self.metadata_fields = config.metadata_fields
        self._is_plain = not self.id_field and not self.metadata_fields

    def __call__(self, record: Any, place: str) -> Document | tuple[str, str]:
        if not isinstance(record, dict):
            return "not_an_object", f"it is a {type(record).__name__}"
        text = record.get(self.text_field)
        # The usual case of many short records, without further calls.
        if (
            self._is_plain
            and isinstance(text, str)
            and text.isascii()
            and "\0" not in text
            and text
            and not text.isspace()
        ):
            return Document(text, place)
        if text is None:
            text = find(record, self.text_field)
            if text is ABSENT:
                return "missing_field", missing(
                    self.text_field, field_names(record), field_names(record, only_texts=True)
                )
        return self.document(text, record, place)

    def document(self, text: Any, record: JsonObject, place: str) -> Document | tuple[str, str]:
        """Return the document of a text whose other fields are in ``record``."""
        fault = text_fault(text, self.text_field)
        if fault:
            return fault
        if self._is_plain:
            return Document(text, place)
        key = None
        if self.id_field:
            value = reach(record, self.id_field)
            if (
                not isinstance(value, str | int)
                or isinstance(value, bool)
                or text_fault(str(value), "id")
            ):
                return "bad_id", f"'{self.id_field}' is no text and no whole number"
            key = str(value)
        return Document(
            text,
            key or place,
            key,
            {name: reach(record, name) for name in self.metadata_fields} or None,
        )


def find(record: Any, name: str) -> Any:
    """The value of a field, or of a path of fields; ``ABSENT`` if there is none."""
    if not isinstance(record, dict):
        return ABSENT
    if name in record:
        return record[name]
    cut = name.rfind(".")
    while cut > 0:
        if (
            name[:cut] in record
            and (found := find(record[name[:cut]], name[cut + 1 :])) is not ABSENT
        ):
            return found
        cut = name.rfind(".", 0, cut)
    return ABSENT


def reach(record: Any, name: str) -> Any:
    """As :func:`find`; None if there is no such field."""
    found = find(record, name)
    return None if found is ABSENT else found


def text_fault(text: Any, field_name: str) -> tuple[str, str] | None:
    """Return why a value cannot be a document's text: (reason, detail), or None if it can."""
    if not isinstance(text, str):
        return (
            ("missing_field", f"'{field_name}' is null")
            if text is None
            else ("not_a_string", f"'{field_name}' is {_kind_of(text)}")
        )
    if not text or text.isspace():
        return "empty", ""
    try:
        # A text keeps the UTF-8 that this makes of it: it is encoded once, and not again for its
        # digest, its size and the engine.
        has_nul = "\0" in text if text.isascii() else b"\0" in codecs.readbuffer_encode(text)[0]
    except UnicodeEncodeError as error:
        return "lone_surrogate", f"half of a UTF-16 pair at character {error.start}"
    return ("nul", f"at character {text.index(chr(0))}") if has_nul else None


def _kind_of(value: Any) -> str:
    if isinstance(value, dict):
        return f"an object with {listed(value)}" if value else "an empty object"
    if isinstance(value, list):
        if not value:
            return "an empty list"
        return (
            "a list of texts"
            if isinstance(value[0], str)
            else f"a list, its first entry {_kind_of(value[0])}"
        )
    return {bool: "true or false", int: "a number", float: "a number"}.get(
        type(value), f"a {type(value).__name__}"
    )


def field_names(record: JsonObject, only_texts: bool = False) -> list[str]:
    """Names of a record's fields, those inside others as a.b."""
    found: list[str] = []
    level = [("", record)]
    for _ in range(NAME_DEPTH):
        inner: list[tuple[str, JsonObject]] = []
        for prefix, fields in level:
            for name, value in fields.items():
                if isinstance(value, str) or not only_texts:
                    found.append(f"{prefix}{name}")
                if isinstance(value, dict):
                    inner.append((f"{prefix}{name}.", value))
        level = inner
        if len(found) > 4 * NAMES_SHOWN:  # more than any message shows
            break
    return found


def listed(names: Iterable[str]) -> str:
    """A few names for the middle of a sentence."""
    names = list(names)
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(one_line(str(name))[:60] for name in names[:NAMES_SHOWN]) + more


def suggestion(wanted: str, names: list[str]) -> str | None:
    """Return the text field that was probably meant: a close name, or else a usual one."""
    by_lower = {name.lower(): name for name in reversed(names)}
    close = difflib.get_close_matches(wanted.lower(), by_lower, 1, 0.7)
    if close:
        return by_lower[close[0]]
    usual = [lower for lower in by_lower if lower.rpartition(".")[2] in USUAL_TEXT_FIELDS]
    best = min(
        usual,
        key=lambda lower: (lower.count("."), USUAL_TEXT_FIELDS.index(lower.rpartition(".")[2])),
        default=None,
    )
    return by_lower[best] if best else None


def missing(wanted: str, names: list[str], texts: list[str]) -> str:
    """Describe what a record or table without a field has instead.

    ``texts`` are the names of those of its fields that hold text.
    """
    probable = suggestion(wanted, texts)
    return f"no '{wanted}' among {listed(names) or 'no fields'}" + (
        f", perhaps '{one_line(probable)}'" if probable else ""
    )


def check_first_file(source: Source[Any], units: list[Unit]) -> None:
    """Read until a record shows that the text field is right; usually that is the first one.

    Raises:
        DataError: if none of the first file's records, or of the first ``FIRST_RECORDS``, has a
            text there.
    """
    fault: LeftOut | None = None
    read = 0
    for unit in units:
        if unit.files[0] != units[0].files[0] or read == FIRST_RECORDS:
            break
        for result in source.read(unit):
            read += 1
            if isinstance(result, Document) or result.reason in (
                "empty",
                "nul",
                "lone_surrogate",
                "bad_id",
            ):
                return
            if result.reason == "missing_field" and result.detail.endswith(" is null"):
                return
            if fault is None and result.reason in ("missing_field", "not_a_string"):
                fault = result
            if read == FIRST_RECORDS:
                break
    if fault is not None:
        advice = "name its field with --text-field"
        if fault.reason == "not_a_string":
            advice += ", or join lists and render chats into one text first"
        raise DataError(f"no record of {fault.path} has a text there ({fault.detail}): {advice}")
