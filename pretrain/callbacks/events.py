"""A record of metrics as (tag, value) pairs, for every tracker and for DeepSpeed's monitor.

A dashboard shows a card for each tag and sorts them by name, so tags decide what a user sees first.
Their number depends on neither the experts nor the layers of the model: of what layers and experts
have, only means and extremes become scalars. metrics.jsonl has every value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from pretrain.analysis.expert_usage import SCALARS
from pretrain.callbacks.base import MetricsRecord
from pretrain.core.files import JsonObject
from pretrain.engine.monitor import TRAIN_LOSS, VALIDATION_LOSS

Events = list[tuple[str, float]]

# The columns that a user looks at first, by the kind of record. Dashboards put groups of tags in
# alphabetical order, and the tags of a group too: hence the group's name, and the digits.
AT_A_GLANCE = {
    ("train", "loss"): TRAIN_LOSS,
    ("validation", "validation_loss"): VALIDATION_LOSS,
    ("validation", "validation_perplexity"): "validation/perplexity",
    ("train", "learning_rate"): "at_a_glance/2_learning_rate",
    ("train", "grad_norm"): "at_a_glance/3_gradient_norm",
    ("train", "tokens_per_second"): "at_a_glance/4_tokens_per_second",
}
# Where a record is in the run. Cards of these for training records are enough.
NO_CARD = ("step", "steps", "tokens", "epoch", "phase_number")
# Columns whose lowest value is the worst one; of all others it is the highest.
LOW_IS_WORSE = ("entropy", "normalized_entropy")
NO_STATISTICS = ("layer", "expert_load", "hottest", "hottest_load")


def events_of(record: MetricsRecord) -> Events:
    """Return every scalar of a record as ``<kind>/<name>``, and summaries over its layers."""
    kind = record["kind"]
    events = [
        (AT_A_GLANCE.get((kind, name), f"{kind}/{name}"), float(value))
        for name, value in record.items()
        if isinstance(value, int | float)
        and name != "step"
        and (kind == "train" or name not in NO_CARD)
    ]
    # Per-layer values would be a card for each layer of each column.
    layers: list[JsonObject] = record.get("layers", [])
    if not layers:
        return events
    if kind == "usage":
        return events + list(_worst_layer("usage", layers, SCALARS))
    names = [name for name in layers[0] if name not in NO_STATISTICS]
    return events + list(_worst_layer("moe", layers, names)) + list(_loads(layers))


def _worst_layer(
    group: str, layers: list[JsonObject], names: Iterable[str]
) -> Iterator[tuple[str, float]]:
    """Yield the value of the worst layer: a mean over 60 layers hides a collapsed one."""
    for name in names:
        worst: Callable[..., float] = min if name in LOW_IS_WORSE else max
        yield f"{group}/{name}_of_worst_layer", float(worst(layer[name] for layer in layers))


def _loads(layers: list[JsonObject]) -> Iterator[tuple[str, float]]:
    """Yield the extreme loads of all experts, and how many experts had no token.

    Loads are in multiples of their layer's mean. Shares would not compare: with 256 experts the
    mean is 1/256, and extremes look like zeros.
    """
    loads = [layer["expert_load"] for layer in layers]
    yield "moe/load_max", max(max(load) * len(load) for load in loads)
    yield "moe/load_min", min(min(load) * len(load) for load in loads)
    yield "moe/unused_experts", float(sum(share == 0 for load in loads for share in load))
