"""What the numerical tests share: a process group of one."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from pretrain.engine.topology import Topology, connect


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    """A process group of one, which stays: DeepSpeed cannot leave a group and join another one.

    The variables it sets are taken back, so that later tests can start processes of their own.
    """
    before = dict(os.environ)
    yield connect(ep_size=1)
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)
