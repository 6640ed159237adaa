"""Peaks of this rank's resident memory while an engine is built and while weights are loaded.

A case has "name", "overrides", "zero", and optionally "file" (of initial weights) and "plain" (the
whole model is built first, as without :mod:`pretrain.engine.placement`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from pretrain.checkpoint.engine_state import load_engine, weight_tensors, write_tensors
from pretrain.checkpoint.foreign_state_dict import FileWeights
from pretrain.checkpoint.initialize_from import stored_readers
from pretrain.checkpoint.tensor_files import TensorReader
from pretrain.checkpoint.weights import WEIGHTS, file_of, files_of
from pretrain.config.load import load_recipe
from pretrain.engine import build as build_module
from pretrain.engine import engine as engine_module
from pretrain.engine.build import WeightLoader
from pretrain.engine.engine import Engine
from tests.support.plain_start import plain_model
from tests.support.rank_worker import make_engine


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def peak_of(action: Callable[[], Any]) -> tuple[Any, int]:
    """What an action returns, and how far the resident memory rose above what it was before."""
    before = resident("VmRSS")
    # 5 sets the peak of the resident memory to what it is now.
    Path("/proc/self/clear_refs").write_text("5")
    result = action()
    return result, resident("VmHWM") - before


def count_live_memory() -> None:
    """Lets glibc map tensors of 64 kB or more by themselves: freed ones are not resident."""
    M_MMAP_THRESHOLD = -3
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    # What an engine does at the end of its start would be there when the next one starts.
    build_module.keep_freed_memory = lambda: None


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    count_live_memory()
    # What the first engine of a process loads and allocates belongs to none.
    make_engine(load_recipe("debug", case["overrides"][-3:]), case["zero"])
    recipe = load_recipe("debug", case["overrides"])
    peaks: dict[str, int] = {}
    build = plain_model if case.get("plain") else engine_module.build_model
    load_weights = loader(case["file"], recipe) if "file" in case else None

    def measured(*arguments: Any) -> torch.nn.Module:
        if load_weights is not None:
            arguments = (*arguments[:4], load_weights, *arguments[5:])
        model, peaks["built"] = peak_of(lambda: build(*arguments))
        return model

    with mock.patch.object(engine_module, "build_model", measured):
        (engine, _), peaks["start"] = peak_of(lambda: make_engine(recipe, case["zero"]))
    sizes = [getattr(one, "ds_numel", one.numel()) for one in engine.model.parameters()]
    if "folder" in case:
        peaks["resume"] = resume(engine, Path(case["folder"]))
    return {
        "name": case["name"],
        "ranks": engine.topology.all_gather(peaks),
        "parameters": sum(sizes),
        "largest": max(sizes),
    }


def loader(file: str, recipe: Any) -> WeightLoader:
    stored = FileWeights(Path(file), recipe.model)
    return lambda model, part, parts: stored_readers(model, stored, part, parts, stored.shapes)


def resume(engine: Engine, folder: Path) -> int:
    """The peak of loading what all ranks have written."""
    topology = engine.topology
    write_tensors(
        folder / file_of(WEIGHTS, topology.rank, topology.world_size), weight_tensors(engine)
    )
    topology.barrier()
    weights = TensorReader(files_of(folder, WEIGHTS))
    _, peak = peak_of(lambda: load_engine(engine, weights, TensorReader([])))
    return peak
