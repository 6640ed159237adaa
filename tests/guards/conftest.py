from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.launch.tiny_run import Tiny, make_tiny, own_process


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def in_process() -> Iterator[None]:
    with own_process():
        yield
