"""Fixtures of a tiny project, and of runs of the training command in it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # imports DeepSpeed, which takes seconds
    from tests.support.tiny_run import Started, Tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Texts, shards, recipe and ds_configs; tests only read them."""
    from tests.support.tiny_run import make_tiny

    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def one_process(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Started]:
    """A finished run of five steps that no launcher started, with the default ds_config, from a
    folder that is not the project's.
    """
    from tests.support.tiny_run import SCRIPT, Started

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
    """The test may call the training command inside its own process."""
    from tests.support.tiny_run import own_process

    with own_process():
        yield
