"""The random generators of a process, as a checkpoint carries them."""

from __future__ import annotations

import random
from typing import NotRequired, TypedDict

import numpy
import torch
from torch import Tensor


class RandomState(TypedDict):
    """The state of every generator, in types that ``torch.load(weights_only=True)`` accepts."""

    python: tuple[object, ...]
    numpy: tuple[str, Tensor, int, int, float]
    torch: Tensor
    cuda: NotRequired[Tensor]


def random_state() -> RandomState:
    """Return the state of every random generator of this process."""
    name, keys, position, has_gauss, cached = numpy.random.get_state(legacy=True)
    assert isinstance(keys, numpy.ndarray)
    # The restricted loader refuses numpy arrays, and torch cannot save uint32 everywhere: int64
    # holds every key.
    stored_keys = torch.from_numpy(keys.astype(numpy.int64))
    state: RandomState = {
        "python": random.getstate(),
        "numpy": (str(name), stored_keys, int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: RandomState) -> None:
    """Set every generator to a saved state; that of a GPU only if both processes have one."""
    random.setstate(state["python"])
    name, keys, position, has_gauss, cached = state["numpy"]
    numpy.random.set_state((name, keys.numpy().astype(numpy.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
