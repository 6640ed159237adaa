"""Filled-in sheets: CSV of the form or of a spreadsheet, checked against the key."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pretrain.core.errors import DataError
from pretrain.evaluation.human.study import PAIRS, SCALE, SIDES, TIE, Key

LARGEST_SHEET_BYTES = 200_000_000
LARGEST_CELL = 50_000_000
LARGEST_NAME = 80


@dataclass(frozen=True)
class Judgement:
    """What one rater said of one item.

    Attributes:
        choice: of a pair: ``left``, ``right`` or ``tie``; None for ratings.
        left: the model that was on the left.
        ratings: by criterion; empty for a pair.
        place: file and line, for sentences.
    """

    rater: str
    item: str
    choice: str | None
    left: int
    ratings: dict[str, int]
    place: str

    @property
    def preferred(self) -> int | None:
        """The preferred model of a pair; None for a tie."""
        return None if self.choice in (None, TIE) else (self.choice == SIDES[1]) ^ self.left


@dataclass(frozen=True)
class Sheets:
    """All judgements of a study; ``unrated`` rows of the sheets are empty, ``partial`` in part."""

    judgements: list[Judgement]
    unrated: int
    comments: int


def read_sheets(paths: Sequence[Path], key: Key, study: str) -> Sheets:
    """The judgements in filled-in sheets.

    Raises:
        DataError: if a file is damaged, belongs to another key, or a rater rates an item twice.
    """
    judgements: dict[tuple[str, str], Judgement] = {}
    unrated = comments = 0
    for path in paths:
        for line, row in _rows(path, key):
            place = f"{path}, line {line}"
            if row["study"] != study:
                raise DataError(
                    f"{place} is of the study {row['study'][:80] or 'without a name'}, and the key"
                    f" is of {study}: give the key of these sheets, as it was written"
                )
            comments += bool(row["comment"])
            found = _judgement(row, key, place)
            if found is None:
                unrated += 1
                continue
            earlier = judgements.setdefault((found.rater.casefold(), found.item), found)
            if earlier is not found:
                raise DataError(
                    f"the rater '{found.rater}' rates item {found.item} twice, in {earlier.place}"
                    f" and in {place}: leave one sheet out, or give two persons two names"
                )
    if not judgements:
        raise DataError(
            f"{', '.join(map(str, paths))[:300]}: nothing is rated in there; fill the sheets in"
        )
    return Sheets(list(judgements.values()), unrated, comments)


def _rows(path: Path, key: Key) -> Iterator[tuple[int, dict[str, str]]]:
    """Each row by its columns, with its line; the rater's name holds until the next one."""
    wanted = ["study", "sheet", "item", "rater", *_rated_columns(key)]
    lines = _parsed(path)
    if not lines:
        raise DataError(f"{path} is empty: give a filled-in sheet")
    header = [name.strip().lower() for name in lines[0][1]]
    if missing := [name for name in wanted if name not in header]:
        raise DataError(
            f"{path} has no column '{missing[0]}': give a sheet of this study, with its first line"
        )
    if len(set(header)) < len(header):
        raise DataError(f"{path} names a column twice in its first line: leave one out")
    rater = ""
    for line, cells in lines[1:]:
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) > len(header) and any(cell.strip() for cell in cells[len(header) :]):
            raise DataError(
                f"{path}, line {line} has {len(cells)} cells under {len(header)} columns: it is"
                " damaged; save it as CSV again"
            )
        row = dict.fromkeys([*wanted, "comment"], "")
        row |= {name: cell.strip() for name, cell in zip(header, cells, strict=False)}
        rater = " ".join(row["rater"].split()) or rater
        yield line, row | {"rater": rater}


def _parsed(path: Path) -> list[tuple[int, list[str]]]:
    try:
        if path.stat().st_size > LARGEST_SHEET_BYTES:
            raise DataError(f"{path} is larger than any sheet: give a filled-in sheet")
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8: save it as CSV in UTF-8") from None
    # Spreadsheets of many languages write semicolons, some programs tabulators.
    first = text.partition("\n")[0]
    delimiter = max(",;\t", key=first.count)
    before = csv.field_size_limit(LARGEST_CELL)
    try:
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        return [(rows.line_num, row) for row in rows]
    except csv.Error as error:
        raise DataError(f"{path} is a damaged CSV ({error}): save it again") from None
    finally:
        csv.field_size_limit(before)


def _rated_columns(key: Key) -> list[str]:
    return ["choice"] if key.mode == PAIRS else key.criteria


def _judgement(row: dict[str, str], key: Key, place: str) -> Judgement | None:
    """The judgement of a row; None if it is not filled in."""
    sheet = key.sheets.get(row["sheet"])
    if sheet is None or row["item"] not in sheet:
        raise DataError(
            f"{place} names item '{row['item'][:80]}' of the sheet '{row['sheet'][:80]}', which the"
            " key does not have: restore both columns"
        )
    given = {name: row[name] for name in _rated_columns(key)}
    if not any(given.values()):
        return None
    if not 0 < len(row["rater"]) <= LARGEST_NAME:
        raise DataError(
            f"{place} is rated, and names no rater (of at most {LARGEST_NAME} letters): fill the"
            " column 'rater' in"
        )
    choice = given.get("choice", "").lower() if key.mode == PAIRS else None
    if choice is not None and choice not in (*SIDES, TIE):
        raise DataError(
            f"{place} has the choice '{choice[:80]}': write {SIDES[0]}, {SIDES[1]} or {TIE}"
        )
    scale = [str(value) for value in range(SCALE[0], SCALE[1] + 1)]
    ratings: dict[str, int] = {}
    for name, value in given.items() if choice is None else ():
        if value and value not in scale:
            raise DataError(
                f"{place} has '{value[:80]}' for {name}: write a number from {SCALE[0]} to"
                f" {SCALE[1]}"
            )
        if value:
            ratings[name] = int(value)
    return Judgement(row["rater"], row["item"], choice, sheet[row["item"]], ratings, place)
