"""A row of metrics as (tag, value) pairs, the same for every tracker and for DeepSpeed's monitor."""

from __future__ import annotations

from collections.abc import Iterator

from pretrain.analysis.expert_usage import SCALARS
from pretrain.callbacks.base import Row

# Beyond this many, one line an expert helps nobody; the extremes are still there, and metrics.jsonl has them all.
MAX_EXPERT_LINES = 256
Events = list[tuple[str, float]]


def events_of(row: Row) -> Events:
    """Every number of a row as ``<kind>/<name>``, and those of its layers by layer."""
    events = [
        (f"{row['kind']}/{name}", float(value))
        for name, value in row.items()
        if isinstance(value, int | float) and name != "step"
    ]
    return events + list(_usage_events(row) if row["kind"] == "usage" else _router_events(row))


def _usage_events(row: Row) -> Iterator[tuple[str, float]]:
    for layer in row["layers"]:
        yield from (
            (f"usage/layer_{layer['layer']:02d}/{name}", float(layer[name])) for name in SCALARS
        )


def _router_events(row: Row) -> Iterator[tuple[str, float]]:
    layers = row.get("layers", [])
    show_experts = sum(len(layer["expert_load"]) for layer in layers) <= MAX_EXPERT_LINES
    for layer in layers:
        prefix, load = f"moe/layer_{layer['layer']:02d}", layer["expert_load"]
        yield from (
            (f"{prefix}/{name}", layer[name])
            for name in ("aux_loss", "z_loss", "entropy", "dropped_share")
        )
        yield from ((f"{prefix}/load_max", max(load)), (f"{prefix}/load_min", min(load)))
        if show_experts:
            yield from (
                (f"{prefix}/expert_{expert:02d}_load", share) for expert, share in enumerate(load)
            )
