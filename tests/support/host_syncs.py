"""Finds, on any machine, what would make the host wait for a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Operators whose output's size or value the host needs at once: on CUDA they copy it and wait.
WAITING = {
    "aten::_local_scalar_dense",  # item(), float(), bool(), if tensor:
    "aten::bincount",
    "aten::equal",
    "aten::is_nonzero",
    "aten::masked_select",
    "aten::nonzero",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::_unique",
    "aten::_unique2",
}
# These index with positions, or with a mask whose true elements are counted first.
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
# Copies to the host, which no operator is needed for on a CPU.
TO_THE_HOST = {"tolist", "numpy", "cpu", "__array__"}


class _Operators(TorchDispatchMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        by_mask = name in INDEXING and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        repeats = name == "aten::repeat_interleave" and kwargs.get("output_size") is None
        if name in WAITING or by_mask or repeats:
            self._found.append(name.removeprefix("aten::"))
        return func(*args, **kwargs)


class _Methods(TorchFunctionMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in TO_THE_HOST:
            self._found.append(func.__name__)
        return func(*args, **(kwargs or {}))


@contextmanager
def host_syncs() -> Iterator[list[str]]:
    """The names of what waits inside the block, in order, backward passes included."""
    found: list[str] = []
    with _Methods(found), _Operators(found):
        yield found
