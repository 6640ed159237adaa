"""torch's own optimizers, which bring its compiler into every start.

Fact: ``add_param_group``, ``zero_grad``, ``state_dict`` and ``load_state_dict`` of every optimizer,
    and the step of Adam, AdamW and SGD, import torch._dynamo, to disable it or to break a graph of
    it, also if nothing is compiled. DeepSpeed leaves it so.
Versions: 0.19.8 with torch 2.13
Upstream: none known
Effect: each rank would spend more than a second of processor time at its start on a compiler that
    it does not use. Nothing of ours compiles an optimizer.
Test:
    tests/integration/engine/test_deepspeed_facts.py::test_optimizers_of_torch_bring_the_compiler
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

METHODS = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
KINDS: tuple[type[torch.optim.Optimizer], ...] = (
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.SGD,
)


def leave_compiler_out_of_optimizers() -> None:
    """Let torch's optimizers run as they do when nothing compiles; once for a process."""
    for name in METHODS:
        plain = inspect.unwrap(getattr(torch.optim.Optimizer, name))
        # Where torch keeps the function that its wrapper calls from the second call on.
        setattr(plain, "__dynamo_disable", plain)
    for kind in KINDS:
        kind.step = _without_graph_breaks(kind.step)  # type: ignore[method-assign]


def _without_graph_breaks(step: Callable[..., Any]) -> Callable[..., Any]:
    """The step with gradients off, unless the optimizer is differentiable: no more, no less."""
    plain = inspect.unwrap(step)

    @wraps(plain)
    def stepped(self: torch.optim.Optimizer, *arguments: Any, **options: Any) -> Any:
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return plain(self, *arguments, **options)

    return stepped
