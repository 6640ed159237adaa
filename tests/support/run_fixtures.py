from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.tiny_run import SCRIPT, Started, Tiny, make_tiny, own_process


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def one_process(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Started]:
    """A finished run of five steps without any launcher, with the default ds_config, from a folder
    that is not the project's.
    """
    folder = tmp_path_factory.mktemp("reference")
    started = Started(
        [sys.executable, SCRIPT, *tiny.arguments(Path("run"), zero=None), "--json", "-"], folder
    )
    assert started.wait() == 0, started.stderr
    assert started.survivors() == []
    return folder / "run", started


@pytest.fixture(scope="session")
def reference(one_process: tuple[Path, Started]) -> Path:
    """The folder of that run; tests only read it."""
    return one_process[0]


@pytest.fixture
def in_process() -> Iterator[None]:
    with own_process():
        yield
