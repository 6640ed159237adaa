"""What the numerical tests share: a process group of one."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from deepspeed.utils import groups
from torch import distributed

from pretrain.engine.topology import Topology, connect, disconnect


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    """A process group of one; the variables it sets are taken back, so that later tests can start processes of their own."""
    before = dict(os.environ)
    yield connect(ep_size=1)
    disconnect()
    # DeepSpeed keeps the groups of a world that is gone, and would use them in the next one.
    for name, value in vars(groups).copy().items():
        if isinstance(value, distributed.ProcessGroup):
            setattr(groups, name, None)
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)
