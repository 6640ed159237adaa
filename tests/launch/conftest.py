from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.launch.tiny_run import SCRIPT, Started, Tiny, make_tiny, own_process


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def reference(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of five steps, by one process without any launcher; tests only read it."""
    run = tmp_path_factory.mktemp("reference") / "run"
    started = Started([sys.executable, SCRIPT, *tiny.arguments(run)], tiny.folder)
    assert started.wait() == 0, started.stderr
    assert started.survivors() == []
    return run


@pytest.fixture
def in_process() -> Iterator[None]:
    with own_process():
        yield
