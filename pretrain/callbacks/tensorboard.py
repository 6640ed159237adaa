"""TensorBoard, CSV, W&B and whatever else DeepSpeed's monitor is configured for."""

from __future__ import annotations

from typing import Protocol

from pretrain.callbacks.base import Callback, Row
from pretrain.evaluation.expert_usage import SCALARS

# Beyond this many, one line an expert helps nobody; the extremes are still there, and metrics.jsonl has them all.
MAX_EXPERT_LINES = 256


class Monitor(Protocol):
    """DeepSpeed's ``MonitorMaster``: writes (tag, value, x) to every backend that the ds_config enables."""

    def write_events(self, event_list: list[tuple[str, float, int]]) -> None: ...


class DeepSpeedMonitor(Callback):
    """Writes every row through DeepSpeed's monitor, by step."""

    def __init__(self, monitor: Monitor) -> None:
        self.monitor = monitor

    def on_row(self, row: Row) -> None:
        step = row["step"]
        names = [name for name, value in row.items() if isinstance(value, int | float) and name not in ("step",)]
        events = [(f"{row['kind']}/{name}", float(row[name]), step) for name in names]
        events += _usage_events(row) if row["kind"] == "usage" else _router_events(row)
        self.monitor.write_events(events)


def _usage_events(row: Row) -> list[tuple[str, float, int]]:
    return [(f"usage/layer_{layer['layer']:02d}/{name}", float(layer[name]), row["step"]) for layer in row["layers"] for name in SCALARS]


def _router_events(row: Row) -> list[tuple[str, float, int]]:
    step, layers = row["step"], row.get("layers", [])
    events: list[tuple[str, float, int]] = []
    show_experts = sum(len(layer["expert_load"]) for layer in layers) <= MAX_EXPERT_LINES
    for layer in layers:
        prefix = f"moe/layer_{layer['layer']:02d}"
        load = layer["expert_load"]
        events += [(f"{prefix}/{name}", layer[name], step) for name in ("aux_loss", "z_loss", "entropy", "dropped_share")]
        events += [(f"{prefix}/load_max", max(load), step), (f"{prefix}/load_min", min(load), step)]
        if show_experts:
            events += [(f"{prefix}/expert_{expert:02d}_load", share, step) for expert, share in enumerate(load)]
    return events
