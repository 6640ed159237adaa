"""What a run's folder shows from outside: its steps, its saves, its checkpoints, its curve."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pretrain.callbacks.environment import ENVIRONMENT
from pretrain.callbacks.metrics import METRICS, read_records
from pretrain.checkpoint.layout import complete_checkpoints, damage, step_of
from pretrain.checkpoint.state_hashes import state_hashes
from pretrain.run.folder import CHECKPOINTS

TAIL_BYTES = 1 << 15
SAVING = ".step_*.tmp"
# What a curve is made of; the rest of a record is of the clock, or follows from these.
LOSSES = ("loss", "total_loss", "validation_loss", "grad_norm")
Curve = dict[tuple[str, int, int], dict[str, float]]
# A temporary folder of a save, and when its entries last changed.
Saves = dict[str, int]


def metrics_time(run: Path) -> int:
    """When the file of records last changed, in nanoseconds; 0 if there is none."""
    try:
        return (run / METRICS).stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def last_step(run: Path) -> int:
    """The step of the newest record of training, 0 without one."""
    path = run / METRICS
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - TAIL_BYTES))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return 0
    # The last piece is empty, or a line that is being written.
    for line in reversed(lines[:-1]):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return int(json.loads(line)["step"])
    return 0


def saves_in_progress(run: Path) -> Saves:
    """The temporary folders of checkpoints; a killed run leaves one behind."""
    found: Saves = {}
    for folder in (run / CHECKPOINTS).glob(SAVING):
        with contextlib.suppress(FileNotFoundError):
            found[folder.name] = folder.stat().st_mtime_ns
    return found


def newest_step(run: Path) -> int:
    """The step of the newest published checkpoint, 0 without one."""
    found = complete_checkpoints(run / CHECKPOINTS)
    return step_of(found[0]) if found else 0


def damaged_checkpoints(run: Path) -> list[str]:
    """What is wrong with published checkpoints, all files hashed."""
    return [
        f"{folder.name}: {fault}"
        for folder in complete_checkpoints(run / CHECKPOINTS)
        if (fault := damage(folder))
    ]


def starts(run: Path) -> list[int]:
    """The step that each start of training continued from."""
    try:
        content = json.loads((run / ENVIRONMENT).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return []
    return [int(start["after_step"]) for start in content["starts"]]


def curve_of(run: Path) -> Curve:
    """The losses of every record, by kind, step and number (the last step is validated twice)."""
    curve: Curve = {}
    for record in read_records(run / METRICS):
        values: Mapping[str, Any] = record
        kind, step = str(values["kind"]), int(values["step"])
        number = sum((kind, step, before) in curve for before in range(3))
        curve[kind, step, number] = {
            name: float(values[name]) for name in LOSSES if values.get(name) is not None
        }
    return curve


def curve_difference(reference: Curve, curve: Curve, relative: float) -> str:
    """The first difference in words; empty if every record is the same.

    Args:
        relative: the largest difference that counts as equal; 0 compares every bit.
    """
    # Norms add up the rounding errors of all weights: only equal arithmetic gives equal ones.
    names = [name for name in LOSSES if not relative or name != "grad_norm"]
    for key in sorted(reference.keys() | curve.keys(), key=lambda key: (key[1], key[0], key[2])):
        where = f"{key[0]} of step {key[1]}"
        if key not in curve or key not in reference:
            return f"{where}: in one of the two runs only"
        for name in names:
            expected, value = reference[key].get(name), curve[key].get(name)
            if not _is_equal(expected, value, relative):
                return f"{where}: {name} is {value!r} instead of {expected!r}"
    return ""


def _is_equal(expected: float | None, value: float | None, relative: float) -> bool:
    if expected is None or value is None:
        return expected is value
    if not relative:
        return expected.hex() == value.hex()
    return abs(value - expected) <= relative * abs(expected)


def state_of_last(run: Path) -> dict[str, str]:
    """SHA-256 of every weight and optimizer state of the newest checkpoint, by name."""
    found = complete_checkpoints(run / CHECKPOINTS)
    # Not of the files: that of a rank has times in it.
    return state_hashes(found[0]) if found else {}


def listing(run: Path) -> set[str]:
    """The names in a run's folder and among its checkpoints, hidden ones included."""
    names = {path.name for path in run.iterdir()}
    checkpoints = run / CHECKPOINTS
    if checkpoints.is_dir():
        names |= {f"{CHECKPOINTS}/{path.name}" for path in checkpoints.iterdir()}
    return names
