"""Whatever a file is and whatever happened to it: each document that an independent reader finds is
found, or counted as lost.
"""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import pytest

from data_pipeline.config import DataConfig
from data_pipeline.preprocess.coordinator import build
from data_pipeline.preprocess.workspace import Output
from data_pipeline.sources.interface import REASONS, Document, LeftOut, ReadContext, open_source
from data_pipeline.tokenizer.config import TrainBPE
from data_pipeline.tokenizer.training import train_bpe
from pretrain.core.errors import DataError, PipelineError
from tests.support.generated_inputs import HARMLESS, Case, cases, has_tools
from tests.support.source_reading import SECTION

pytestmark = has_tools
UNIT_BYTES = (37, 1 << 20)
# A build is slower than reading: so many of the cases, spread over all, are built.
BUILDS = 40


class Read:
    """What our reader makes of a case."""

    def __init__(self, case: Case, folder: Path, unit_bytes: int) -> None:
        path = folder / case.name
        path.write_bytes(case.content)
        self.refusal: str | None = None
        self.notes: Counter[str] = Counter()
        results: list[Document | LeftOut] = []
        try:
            source = open_source(
                SECTION.validate_python({**case.format.section, "input": [str(path)]}),
                ReadContext("all"),
            )
            for unit in source.units(unit_bytes):
                results += source.read(unit)
                self.notes.update(source.notes)
        except PipelineError as error:
            self.refusal = str(error)
        finally:
            path.unlink()
        self.texts = [result.text for result in results if isinstance(result, Document)]
        self.left_out = [result for result in results if isinstance(result, LeftOut)]


def fault(case: Case, read: Read) -> str | None:
    """What is wrong with a reading; None if every document is there or counted."""
    if read.refusal is not None:
        return f"refused: {read.refusal}" if case.damage in HARMLESS else None
    if unknown := {left.reason for left in read.left_out} - set(REASONS):
        return f"unknown reasons {unknown}"
    if case.damage in HARMLESS:
        if read.left_out:
            return f"left out {read.left_out[:3]}"
        return (
            None if read.texts == case.expected else "other documents than the independent reader's"
        )
    missing, extra = (
        Counter(case.expected) - Counter(read.texts),
        Counter(read.texts) - Counter(case.expected),
    )
    of_stream = [left for left in read.left_out if left.reason == "damaged_compression"]
    lost_bytes = sum(left.size or 0 for left in read.left_out)
    # What gzip gives out behind a wrong distance is what its window happened to hold; the bytes
    # behind it are reported as lost.
    is_counted = missing.total() <= len(read.left_out) or any(left.size for left in of_stream)
    if not is_counted and lost_bytes < sum(len(text.encode()) for text in missing.elements()):
        return (
            f"{missing.total()} documents are missing, and {len(read.left_out)} records are"
            f" counted: {list(missing)[:2]}"
        )
    # more is had of a damaged stream than its tool gives, and behind a changed byte it may be
    # anything
    if of_stream:
        return None
    whole = "\n".join(case.texts)
    foreign = [text for text in extra if text.strip() not in whole]
    return f"documents from nowhere: {foreign[:2]}" if foreign and not read.left_out else None


def run(folder: Path, seeds: int, damaged_seeds: int) -> Counter[str]:
    seen: Counter[str] = Counter()
    faults = []
    for number, case in enumerate(cases(seeds, damaged_seeds)):
        read = Read(case, folder, UNIT_BYTES[number % 2])
        seen["cases"] += 1
        seen["refused"] += read.refusal is not None
        seen["documents"] += len(read.texts)
        seen.update(left.reason for left in read.left_out)
        if problem := fault(case, read):
            faults.append(f"{case.format.name} {case.container.name} {case.damage}: {problem}")
    assert not faults, "\n".join([f"{len(faults)} of {seen['cases']}", *faults[:40]])
    return seen


def test_no_document_of_a_generated_file_is_lost_in_silence(tmp_path: Path) -> None:
    seen = run(tmp_path, 1, 2)
    assert seen["cases"] >= 1000 and seen["documents"] > 5000
    assert seen["refused"] < 0.1 * seen["cases"]
    expected = {
        "damaged_compression",
        "invalid_json",
        "invalid_csv",
        "invalid_utf8",
        "field_count",
        "repeated_header",
    }
    assert expected <= set(seen), seen


def test_a_reader_that_lost_a_document_would_be_noticed(tmp_path: Path) -> None:
    noticed = Counter[bool]()
    for case in itertools.islice(cases(1, 1), 0, None, 7):
        read = Read(case, tmp_path, 1 << 20)
        if (
            read.texts
            and read.refusal is None
            and not read.left_out
            and Counter(read.texts) == Counter(case.expected)
        ):
            read.texts.pop()
            noticed[fault(case, read) is not None] += 1
    assert noticed[True] > 50 and not noticed[False]


def test_builds_count_what_the_reader_counts_and_stop_if_too_much_is_lost(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_bytes(train_bpe(["some words"], TrainBPE(vocab_size=258)).content)
    every = list(cases(1, 1))
    stopped = 0
    for number, case in enumerate(every[:: len(every) // BUILDS]):
        read, path = Read(case, tmp_path, 1 << 20), tmp_path / case.name
        path.write_bytes(case.content)
        section = {
            "source": {**case.format.section, "input": [str(path)]},
            "tokenizer": {"kind": "file", "path": str(tokenizer)},
        }
        config = DataConfig.model_validate({**section, "validation_share": 0.0})
        bad = Counter(left.reason for left in read.left_out if left.is_bad)
        try:
            source = build(config, Output(tmp_path / str(number)), workers=1).manifest.sources[
                "all"
            ]
        except DataError as error:
            stopped += 1
            records = len(read.texts) + len(read.left_out)
            assert case.damage not in HARMLESS
            assert (
                read.refusal
                or not read.texts
                or bad.total() > 0.05 * records
                or sum(left.size or 0 for left in read.left_out)
            ), error
        else:
            assert (source.documents, source.bad) == (len(read.texts), dict(bad))
            assert read.refusal is None and (
                bad.total() <= 1 or bad.total() <= 0.05 * source.records
            )
    assert 0 < stopped < BUILDS


@pytest.mark.full
def test_no_document_of_many_generated_files_is_lost_in_silence(tmp_path: Path) -> None:
    assert run(tmp_path, 3, 6)["cases"] >= 5_000
