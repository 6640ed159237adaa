"""Which files of tests start first."""

from __future__ import annotations

from tests.conftest import LONGEST_FIRST
from tests.support.paths import TESTS


def test_each_file_that_starts_first_is_there() -> None:
    assert [name for name in LONGEST_FIRST if not (TESTS / name).is_file()] == []
