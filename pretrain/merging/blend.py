"""Weighted means of checkpoints of one model: averages, soups, exponential moving averages.

Each is a chain of steps towards the next checkpoint, mean += rate * (weight - mean), so that equal
weights stay the same bit for bit, and only two tensors are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from pretrain.checkpoint.lazy_weights import StoredWeights
from pretrain.core.errors import CheckpointError, ConfigError


def uniform_rates(count: int) -> list[float]:
    """Rates of a uniform mean (SWA, Izmailov et al. 2018; LAWA, Kaddour 2022)."""
    return [1.0 / (index + 1) for index in range(count)]


def weighted_rates(weights: Sequence[float]) -> list[float]:
    """Rates for given weights, divided by their sum (model soups, Wortsman et al. 2022).

    Raises:
        ConfigError: for a negative weight, or if all are zero.
    """
    if any(weight < 0 for weight in weights) or not sum(weights) > 0:
        raise ConfigError(
            f"the weights {', '.join(f'{weight:g}' for weight in weights)} cannot be: give numbers"
            " from 0 up, and one above 0"
        )
    # Step i moves the mean by its weight's share of all weights so far.
    totals = [sum(weights[: index + 1]) for index in range(len(weights))]
    return [weight / total if total else 1.0 for weight, total in zip(weights, totals, strict=True)]


def decay_rates(count: int, decay: float) -> list[float]:
    """Rates of mean = decay * mean + (1 - decay) * weight (Polyak & Juditsky 1992).

    Raises:
        ConfigError: for a decay outside of [0, 1).
    """
    if not 0 <= decay < 1:
        raise ConfigError(f"--decay is {decay}: give a number from 0 up and below 1")
    return [1.0] + [1.0 - decay] * (count - 1)


def check_same_tensors(stores: Sequence[StoredWeights]) -> None:
    """Raises :class:`CheckpointError` unless all checkpoints have the same tensors and shapes."""
    first = stores[0]
    for other in stores[1:]:
        for name in sorted(first.keys() | other.keys()):
            shapes = [
                list(store.shapes[name]) if name in store else "missing" for store in (first, other)
            ]
            if shapes[0] != shapes[1]:
                raise CheckpointError(
                    f"the tensor '{name}' is {shapes[0]} in {first.folder} and {shapes[1]} in"
                    f" {other.folder}: give checkpoints of one model"
                )


def blended(stores: Sequence[Mapping[str, Tensor]], rates: Sequence[float], name: str) -> Tensor:
    """The mean of one tensor, fp32; the first rate counts as 1, as there is no mean before it."""
    mean = stores[0][name].clone()
    for store, rate in zip(stores[1:], rates[1:], strict=True):
        if rate:
            # lerp of two equal values is exact, unlike a * (1 - rate) + b * rate.
            mean.lerp_(store[name], rate)
    return mean


def blended_tensors(
    stores: Sequence[StoredWeights], rates: Sequence[float]
) -> Iterator[tuple[str, Tensor]]:
    """Yields the mean of every tensor, one at a time.

    Raises:
        CheckpointError: if the checkpoints are not of one model.
    """
    check_same_tensors(stores)
    yield from ((name, blended(stores, rates, name)) for name in stores[0])
