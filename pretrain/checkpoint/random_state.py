"""The random generators of a process, as a checkpoint carries them."""

from __future__ import annotations

import random
from typing import Any, NotRequired, TypedDict

import numpy
import torch
from torch import Tensor

from pretrain.core.seeds import derived_seed


class RandomState(TypedDict):
    """The state of every generator, in types that a rank's file holds."""

    python: list[object]
    numpy: list[object]
    torch: Tensor
    cuda: NotRequired[Tensor]


def random_state() -> RandomState:
    """Return the state of every random generator of this process."""
    name, keys, position, has_gauss, cached = numpy.random.get_state(legacy=True)
    assert isinstance(keys, numpy.ndarray)
    state: RandomState = {
        "python": list(random.getstate()),
        "numpy": [str(name), keys.tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: RandomState) -> None:
    """Set every generator to a saved state; that of a GPU only if both processes have one."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))  # type: ignore[arg-type]
    name, keys, *rest = state["numpy"]
    # Typed as object, because JSON has one type for all lists.
    values: Any = (name, numpy.array(keys, dtype=numpy.uint32), *rest)
    numpy.random.set_state(values)
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def derive_random_state(seed: int, step: int, rank: int) -> None:
    """Set every generator of a rank of which a checkpoint knows nothing.

    Two ranks, or one rank at two steps, never draw the same numbers.
    """
    derived = derived_seed(f"{seed} {step} {rank}")
    random.seed(derived)
    numpy.random.seed(derived % 2**32)
    # Those of all devices.
    torch.manual_seed(derived)
