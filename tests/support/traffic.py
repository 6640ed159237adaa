"""Counts the bytes that a layer's operators read and write, matrix products apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PRODUCTS = {"aten::mm", "aten::addmm", "aten::_grouped_mm"}
# They return memory or an alias, and touch no element.
UNTOUCHED = {
    "aten::empty",
    "aten::new_empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty_strided",
    "aten::_unsafe_view",
    "aten::detach",
}
# They read as many elements of their first input as they write, however many it has.
GATHERS = {"aten::index_select", "aten::index", "pretrain::gather_tokens"}


class Traffic(TorchDispatchMode):
    """Counts inside its block, backward passes included.

    An operator reads each of its inputs once and writes its outputs once. Tensors are counted by
    their number of elements, whatever their shape; small ones (ids, weights of choices, matrices)
    are not.

    Args:
        units: the name of each number of elements that is counted, for example {T * D: "TD"}.

    Attributes:
        bytes: by unit, bytes per element.
        operators: that are neither views nor products, in order.
    """

    def __init__(self, units: Mapping[int, str]) -> None:
        super().__init__()
        self._units = units
        self.bytes: Counter[str] = Counter()
        self.operators: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        name = func._schema.name
        if not (func.is_view or name in PRODUCTS or name in UNTOUCHED):
            self.operators.append(name)
            written = _tensors(outputs)
            read = written if name in GATHERS else _tensors((args, kwargs))
            for tensor in (*read, *written):
                if unit := self._units.get(tensor.numel()):
                    self.bytes[unit] += tensor.element_size()
        return outputs


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]
