"""The order of training samples, as a pure function of (seed, position).

There is nothing to store, and nothing to replay when a run resumes.

Each epoch is a permutation of all samples by a keyed Feistel network (Luby & Rackoff 1988),
restricted to the samples by cycle walking (Black & Rogaway 2002). It takes constant memory whatever
the number of samples.
"""

from __future__ import annotations

import hashlib

import numpy as np

ROUNDS = 8
# The finaliser of SplitMix64 (Steele, Lea & Flood 2014).
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def permute(indices: np.ndarray, num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """Map positions to the samples of an epoch's order: a bijection on [0, num_samples).

    Args:
        indices: any shape, integers in [0, num_samples).
        num_samples: samples of an epoch, from 1 to 2^62.
        seed: chooses the family of orders.
        epoch: chooses the order.

    Returns:
        int64, of the shape of ``indices``.

    Raises:
        ValueError: for an index outside [0, num_samples).
    """
    values = np.asarray(indices)
    if values.size and (values.min() < 0 or values.max() >= num_samples):
        raise ValueError(f"indices must be in [0, {num_samples})")
    # Both halves of a Feistel network have the same number of bits, so their total is even.
    half_bits = max(1, ((num_samples - 1).bit_length() + 1) // 2)
    keys = _round_keys(seed, epoch)
    # Unsigned: the products below overflow on purpose, and uint64 wraps without a warning.
    flat = _feistel(values.astype(np.uint64).ravel(), half_bits, keys)
    # The network permutes a power of four, at most four times too large: what falls outside walks
    # on until it is back inside.
    outside = flat >= num_samples
    while outside.any():
        flat[outside] = _feistel(flat[outside], half_bits, keys)
        outside = flat >= num_samples
    return flat.astype(np.int64).reshape(values.shape)


def shuffled(positions: np.ndarray, num_samples: int, seed: int) -> np.ndarray:
    """Return the samples at these positions of the endless sequence of epochs.

    Each epoch is a new permutation. The result is int64, of the shape of ``positions``.
    """
    # A step near the end of an epoch takes positions of two epochs, each with its own order.
    epochs, places = np.divmod(np.asarray(positions, dtype=np.int64), num_samples)
    result = np.empty_like(places)
    for epoch in np.unique(epochs):
        inside = epochs == epoch
        result[inside] = permute(places[inside], num_samples, seed, int(epoch))
    return result


def sample_indices(first: int, count: int, num_samples: int, seed: int) -> np.ndarray:
    """The samples at positions first .. first + count - 1, see :func:`shuffled`: int64 [count]."""
    return shuffled(np.arange(first, first + count), num_samples, seed)


def _round_keys(seed: int, epoch: int) -> np.ndarray:
    digest = hashlib.blake2b(
        f"sample order {seed} {epoch}".encode("ascii"), digest_size=8 * ROUNDS
    ).digest()
    return np.frombuffer(digest, dtype="<u8")


def _feistel(values: np.ndarray, half_bits: int, keys: np.ndarray) -> np.ndarray:
    """A balanced Feistel network on 2 * half_bits bits: uint64 [n] -> uint64 [n]."""
    shift = np.uint64(half_bits)
    mask = np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << shift) | right


def _mix(values: np.ndarray) -> np.ndarray:
    values = (values ^ (values >> np.uint64(30))) * _MIX_1
    values = (values ^ (values >> np.uint64(27))) * _MIX_2
    return values ^ (values >> np.uint64(31))
