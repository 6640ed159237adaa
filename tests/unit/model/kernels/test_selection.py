"""When fused kernels compute."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pretrain.core.errors import ConfigError
from pretrain.model.kernels import selection
from pretrain.model.kernels.selection import set_fused_kernels, use_fused


class OnCuda:
    """What the selection reads of a tensor on CUDA."""

    is_cuda = True

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        self.dtype = dtype


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    set_fused_kernels("auto")


def test_they_compute_on_cuda_and_not_on_cpus() -> None:
    x: Any = OnCuda()
    assert use_fused(x) and not use_fused(torch.zeros(2))
    set_fused_kernels("none")
    assert not use_fused(x)


def test_they_need_triton_and_a_dtype_that_fp32_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    double: Any = OnCuda(torch.float64)
    half: Any = OnCuda(torch.float16)
    assert not use_fused(double) and use_fused(half)
    monkeypatch.setattr(selection, "_HAS_TRITON", False)
    assert not use_fused(half)


def test_cpus_need_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_interprets", lambda: False)
    with pytest.raises(ConfigError, match="TRITON_INTERPRET=1"):
        set_fused_kernels("always")
    assert not use_fused(torch.zeros(2))
    monkeypatch.setattr(selection, "_interprets", lambda: True)
    set_fused_kernels("always")
    assert use_fused(torch.zeros(2))


def test_another_mode_is_refused() -> None:
    mode: Any = "all"
    with pytest.raises(ConfigError, match="no mode 'all'"):
        set_fused_kernels(mode)
