"""Activation checkpointing: what of a block is kept for the backward pass, and what is recomputed.

Chen et al. 2016, arXiv 1604.06174; selective: Korthikanti et al. 2022, arXiv 2205.05198, section 5.

torch's ``create_selective_checkpoint_contexts`` wants a recomputation to run the same operators as
the first pass. ZeRO 3 gathers weights at other places in it, and a mask is built in the first pass
only, so here only the operators that are kept have to be the same ones.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import noop_context_fn

from pretrain.model.config import Recomputation

Contexts = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]

# Operators whose outputs selective recomputation keeps, by name: not every torch has all of them.
KEPT = frozenset(
    (
        # matrix products
        "aten::mm aten::addmm aten::bmm aten::baddbmm aten::_grouped_mm aten::_scaled_mm "
        # attention
        "aten::_scaled_dot_product_flash_attention "
        "aten::_scaled_dot_product_flash_attention_for_cpu "
        "aten::_scaled_dot_product_efficient_attention "
        "aten::_scaled_dot_product_cudnn_attention "
        "torch_attn::_varlen_attn "
        "flash_attn::_flash_attn_forward flash_attn::_flash_attn_varlen_forward "
        # exchanges between the ranks that share a sequence
        "pretrain::exchange_parts pretrain::mean_of_ranks "
        "pretrain::gather_parts pretrain::scatter_sums "
    ).split()
)


class _Kept(NamedTuple):
    """The output of an operator, detached, and what shows that it is still the right one.

    Attributes:
        shapes: of the tensors that the operator got.
        versions: how often each tensor of the output had been changed in place.
    """

    output: Any
    shapes: list[torch.Size]
    versions: list[int]


# The outputs of each operator in the order of its calls.
_Outputs = defaultdict[str, deque[_Kept]]


def contexts(kind: Recomputation) -> Contexts:
    """What ``torch.utils.checkpoint.checkpoint`` takes as ``context_fn``."""
    return _selective if kind == "selective" else noop_context_fn


def _selective() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    outputs: _Outputs = defaultdict(deque)
    return _Keep(outputs), _Reuse(outputs)


class _Mode(TorchDispatchMode):
    def __init__(self, outputs: _Outputs) -> None:
        super().__init__()
        self.outputs = outputs

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled code runs under this mode, and is recomputed whole."""
        return True


class _Keep(_Mode):
    """Keeps the outputs of a first pass."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if _is_kept(func, args, kwargs):
            detached = tree_map(_detached, output)
            versions = [tensor._version for tensor in _tensors(detached)]
            self.outputs[func.name()].append(_Kept(detached, _shapes(args), versions))
        return output


class _Reuse(_Mode):
    """Returns them in the recomputation, once."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _is_kept(func, args, kwargs):
            return func(*args, **kwargs)
        outputs = self.outputs[func.name()]
        if not outputs or outputs[0].shapes != _shapes(args):
            raise RuntimeError(
                f"selective recomputation has no output of {func.name()} of these shapes: the "
                "forward pass did something else, or this is a second backward pass over it"
            )
        kept = outputs.popleft()
        if kept.versions != [tensor._version for tensor in _tensors(kept.output)]:
            raise RuntimeError(f"an output of {func.name()} was changed in place after it was kept")
        return kept.output


def _is_kept(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the output of this call is kept.

    Not that of a batched product of one row each, such as the weighted sum of a token's experts: it
    is computed as fast as it is read. Nor that of an attention that draws random numbers: if the
    recomputation left it out, all that is drawn after it would be other numbers.
    """
    if operator.name() not in KEPT:
        return False
    first = args[0] if args else None
    if isinstance(first, torch.Tensor) and first.dim() == 3 and first.shape[1] == 1:
        return False
    schema = getattr(operator, "_schema", None)
    names = [] if schema is None else [argument.name for argument in schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    return given.get("dropout_p", 0.0) == 0.0


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _shapes(args: tuple[Any, ...]) -> list[torch.Size]:
    return [tensor.shape for tensor in _tensors(args)]
