"""Computes which samples a run has seen, from what its checkpoint stores."""

from __future__ import annotations

import numpy as np

from data_pipeline.loading.mixture import MixtureEntry, MixtureSchedule
from data_pipeline.loading.shuffle import shuffled
from pretrain.core.errors import DataError
from pretrain.core.files import JsonObject


def seen_samples(
    plans: list[JsonObject], consumed_samples: int, seed: int
) -> dict[str, np.ndarray]:
    """Each sample of each source that a run has seen, once, in the order of their first use: int64.

    Every epoch is a permutation, so a source's first epoch contains each sample once and later ones
    add none.

    Args:
        plans: of the checkpoint's data state, see :meth:`Loader.state`.
        consumed_samples: of all sources, as that state counts them.
        seed: of the sample order.

    Raises:
        DataError: if the run changed its longest sequence on a resume, and with it its samples.
    """
    schedule = MixtureSchedule([MixtureEntry.from_dict(plan) for plan in plans])
    if len({entry.sequence_length for entry in schedule.entries}) > 1:
        raise DataError(
            "which samples the model has seen is unknown for a run whose longest sequence was "
            "changed on a resume"
        )
    taken = schedule.taken(consumed_samples)
    sizes = {
        name: source.num_samples
        for entry in schedule.entries
        for name, source in entry.sources.items()
    }
    return {
        name: shuffled(np.arange(min(taken[name], size)), size, seed)
        for name, size in sizes.items()
    }
