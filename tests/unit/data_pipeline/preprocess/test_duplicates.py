"""Marks of duplicates are those of a plain search in memory, whatever the units, the memory and
what an earlier run left.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from data_pipeline.preprocess.duplicates import UnitKeys, mark_duplicates
from tests.support.paths import ROOT

Digests = NDArray[np.uint64]


def write_units(
    folder: Path, digests: Digests, bands: Digests | None, sizes: list[int]
) -> list[UnitKeys]:
    """The rows in units of these sizes, and the rest in a last one."""
    units = []
    cuts = np.minimum(np.cumsum(sizes), len(digests)) if sizes else np.zeros(0, int)
    for number, part in enumerate(np.split(np.arange(len(digests)), cuts)):
        unit = UnitKeys(
            folder / f"{number}.digests.npy",
            None if bands is None else folder / f"{number}.bands.npy",
            folder / f"{number}.marks.npy",
        )
        np.save(unit.digests, digests[part])
        if bands is not None and unit.bands is not None:
            np.save(unit.bands, bands[part])
        units.append(unit)
    return units


def marks_of(units: list[UnitKeys]) -> list[int]:
    parts = [np.load(unit.marks) for unit in units]
    assert all(part.dtype == np.uint8 for part in parts)
    assert [len(part) for part in parts] == [len(np.load(unit.digests)) for unit in units]
    return np.concatenate(parts).tolist()


def reference(digests: Digests, bands: Digests | None, exact: bool) -> list[int]:
    """A dictionary and a union-find, one row after the other."""
    seen: set[tuple[int, ...]] = set()
    marks = []
    for digest in map(tuple, digests.tolist()):
        marks.append(int(exact and digest in seen))
        seen.add(digest)
    if bands is None:
        return marks
    parent = list(range(len(digests)))

    def root(row: int) -> int:
        while parent[row] != row:
            row = parent[row]
        return row

    owner: dict[int, int] = {}
    for row, keys in enumerate(bands.tolist()):
        for key in keys if not marks[row] else ():
            left, right = sorted((root(row), root(owner.setdefault(key, row))))
            parent[right] = left
    return [mark or 2 * (root(row) != row) for row, mark in enumerate(marks)]


def keys_of(draw_values: list[int], spread: bool) -> Digests:
    """Small numbers as they are, all in one partition, or spread over the whole range."""
    keys = np.array(draw_values, np.uint64)
    return keys * np.uint64(0x9E3779B97F4A7C15) if spread else keys


@settings(max_examples=80, deadline=None)
@given(
    st.data(),
    st.integers(0, 40),
    st.integers(1, 4),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1, 200, 1000, 4000, 1 << 20]),
)
def test_marks_are_those_of_a_plain_search(
    data: st.DataObject, rows: int, width: int, exact: bool, spread: bool, memory_bytes: int
) -> None:
    few = st.integers(0, 12)
    digests = keys_of(
        data.draw(st.lists(few, min_size=2 * rows, max_size=2 * rows)), spread
    ).reshape(rows, 2)
    digests[:, 0] %= 3  # so that the first halves are equal where the second ones differ
    many = st.integers(0, 4 * rows + 1)
    bands = keys_of(
        data.draw(st.lists(many, min_size=width * rows, max_size=width * rows)), spread
    ).reshape(rows, width)
    sizes = data.draw(st.lists(st.integers(0, 15), max_size=4))
    near = data.draw(st.booleans())
    with tempfile.TemporaryDirectory() as name:
        units = write_units(Path(name), digests, bands if near else None, sizes)
        mark_duplicates(units, Path(name) / "scratch", exact, near, memory_bytes)
        assert marks_of(units) == reference(digests, bands if near else None, exact)
        assert list((Path(name) / "scratch").iterdir()) == []
        assert not list(Path(name).glob("*.tmp"))


def test_the_reference_itself_tells_what_the_rules_say() -> None:
    digests = np.array([[1, 1], [1, 2], [1, 1], [3, 3], [4, 4], [5, 5]], np.uint64)
    #       row 0     row 1     exact     linked to 1 through 4   alone
    bands = np.array([[10, 20], [11, 21], [11, 29], [12, 23], [11, 23], [15, 25]], np.uint64)
    assert reference(digests, bands, exact=True) == [0, 0, 1, 2, 2, 0]
    assert reference(digests, bands, exact=False) == [0, 0, 2, 2, 2, 0]
    assert reference(digests, None, exact=True) == [0, 0, 1, 0, 0, 0]


@pytest.mark.parametrize("memory_bytes", [1 << 10, 1 << 14, 1 << 24])
def test_a_long_chain_is_one_component(tmp_path: Path, memory_bytes: int) -> None:
    rows = 3000
    order = np.random.default_rng(0).permutation(rows).astype(np.uint64)
    # Row r shares one band with the row before it in a random order, and one with the row after it.
    bands = np.stack([order, order + 1], axis=1) * np.uint64(0x9E3779B97F4A7C15)
    digests = np.stack([order, order], axis=1)
    units = write_units(tmp_path, digests, bands, [1000, 0, 500])
    mark_duplicates(units, tmp_path, True, True, memory_bytes)
    assert marks_of(units) == [0] + [2] * (rows - 1)
    # Without one link it falls into two parts.
    bands[np.flatnonzero(order == 1500), 0] = 1
    units = write_units(tmp_path, digests, bands, [1000, 0, 500])
    mark_duplicates(units, tmp_path, True, True, memory_bytes)
    assert marks_of(units).count(0) == 2


def test_one_key_that_half_of_the_corpus_has_does_not_fill_a_partition(tmp_path: Path) -> None:
    digests = np.random.default_rng(0).integers(0, 1 << 63, (4000, 2)).astype(np.uint64)
    digests[::2] = 7
    units = write_units(tmp_path, digests, None, [])
    mark_duplicates(units, tmp_path, True, False, memory_bytes=80 * 100)
    assert marks_of(units) == [0] + [0, 1] * 1999 + [0]


def test_what_a_killed_run_left_is_no_part_of_the_next(tmp_path: Path) -> None:
    digests = np.arange(2000, dtype=np.uint64).reshape(1000, 2) * np.uint64(0x9E3779B97F4A7C15)
    units = write_units(tmp_path, digests, None, [300])
    left = tmp_path / "scratch" / "duplicates" / "digests"
    left.mkdir(parents=True)
    (left / "00000000").write_bytes(b"\0" * 24 * 10)
    units[0].marks.with_name(units[0].marks.name + ".tmp").write_bytes(b"half")
    mark_duplicates(units, tmp_path / "scratch", True, False, 1 << 12)
    assert marks_of(units) == [0] * 1000


def test_progress_only_grows_and_ends_at_the_total(tmp_path: Path) -> None:
    keys = np.arange(600, dtype=np.uint64).reshape(300, 2)
    units = write_units(tmp_path, keys, keys, [100, 50])
    calls: list[tuple[int, int]] = []
    mark_duplicates(
        units, tmp_path, True, True, 1 << 12, lambda done, total: calls.append((done, total))
    )
    assert calls == sorted(calls) and calls[-1] == (900, 900) and len(calls) > 6
    mark_duplicates([], tmp_path, True, True)


MANY = """
import resource, sys, time
from pathlib import Path
import numpy as np
from data_pipeline.preprocess.duplicates import UnitKeys, mark_duplicates
folder, memory_mb = Path(sys.argv[1]), int(sys.argv[2])
units = [UnitKeys(folder / f"{n}.d.npy", folder / f"{n}.b.npy", folder / f"{n}.m.npy") for n in range(8)]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.process_time()
mark_duplicates(units, folder, True, True, memory_mb << 20)
print(time.process_time() - start, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


def test_two_million_documents_take_seconds_and_bounded_memory(tmp_path: Path) -> None:
    rows, width, units = 250_000, 4, 8
    source = np.random.default_rng(0)
    originals, copies = source.integers(0, 1 << 63, (rows, 2)).astype(np.uint64), 10_000
    for number in range(units):
        digests = source.integers(0, 1 << 63, (rows, 2)).astype(np.uint64)
        bands = source.integers(0, 1 << 63, (rows, width)).astype(np.uint64)
        if number:
            digests[:copies] = originals[:copies]
            bands[copies : 2 * copies, number % width] = np.arange(
                copies, dtype=np.uint64
            ) * np.uint64(0x9E3779B97F4A7C15)
        else:
            digests = originals
        np.save(tmp_path / f"{number}.d.npy", digests)
        np.save(tmp_path / f"{number}.b.npy", bands)
    output = subprocess.run(
        [sys.executable, "-c", MANY, str(tmp_path), "32"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    seconds, megabytes = map(float, output.stdout.split())
    marks = np.concatenate([np.load(tmp_path / f"{number}.m.npy") for number in range(units)])
    assert np.bincount(marks).tolist() == [
        rows * units - 7 * copies - 6 * copies,
        7 * copies,
        6 * copies,
    ]
    # Keys are 96 MB; 32 MB are asked for, and what is mapped of files counts too: 18 MB of marks
    # and parents, and one unit's 12 MB.
    assert megabytes < 32 + 18 + 12 + 16
    assert seconds < 5
