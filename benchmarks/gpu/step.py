"""Whole training steps of this project's engine on one GPU: tokens a second, MFU, kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import repeat

import torch
from peers.models import token_batches
from peers.train_step import our_step
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from gpu.models import recipe_of
from gpu.timing import Bench, timed
from pretrain.config.recipe import Recipe
from pretrain.core.files import JsonObject
from pretrain.model.sizes import model_size, peak_flops
from pretrain.run.memory import activation_bytes, state_bytes_per_rank

MICRO_BATCHES = 4
MOST_LAYERS = 24
# Of the device's memory; the rest is for buckets of gradients and for fragments.
USED_SHARE = 0.75
# What is aimed at. Whether it is reached is what is measured.
MFU_GOALS = {"coarse": 0.45, "fine": 0.35}
WAYS: dict[str, tuple[str, ...]] = {
    "plain ZeRO 1, no documents": (),
    "no fused kernels": ("train.fused_kernels=none",),
}
ROWS = 25


def fitting(model: str, memory: float, *overrides: str, tiny: bool = False) -> Recipe:
    """The model with as many layers as ``memory`` bytes hold in training, up to ``MOST_LAYERS``."""
    sizes = [2] if tiny else range(MOST_LAYERS, 0, -2)
    for layers in sizes:
        recipe = recipe_of(model, f"model.num_hidden_layers={layers}", *overrides, tiny=tiny)
        size = model_size(recipe.model, recipe.train.sequence_length)
        state = state_bytes_per_rank(size, "bf16", 1, 1, 1, recipe.optimizer)["total"]
        if state + activation_bytes(recipe.model, recipe.train, "bf16") < memory:
            break
    return recipe


def jobs() -> list[tuple[str, str]]:
    """The model and the way to train it of each process."""
    return [(model, way) for model in MFU_GOALS for way in WAYS]


def measure(bench: Bench, model: str, way: str) -> dict[str, JsonObject]:
    """Steps of one model in one way of ``WAYS``, by its name."""
    memory = float("inf")
    if bench.device.type == "cuda":
        memory = USED_SHARE * torch.cuda.mem_get_info()[1]
    micro_batch = 2 if bench.quick else 4
    recipe = fitting(
        model,
        memory,
        f"train.micro_batch_size={micro_batch}",
        f"train.global_batch_size={micro_batch * MICRO_BATCHES}",
        *WAYS[way],
        tiny=bench.quick,
    )
    return {way: _steps(bench, recipe, model)}


def _steps(bench: Bench, recipe: Recipe, model: str) -> JsonObject:
    step = our_step(recipe)
    batches: Iterator[list[torch.Tensor]] = token_batches(recipe, MICRO_BATCHES)
    current: list[list[torch.Tensor]] = []

    def prepare() -> None:
        current[:] = [[ids_BS.to(bench.device) for ids_BS in next(batches)]]

    found = timed(bench, lambda: step(current[0]), prepare)
    size = model_size(recipe.model, recipe.train.sequence_length)
    rate = recipe.train.tokens_per_step / found.seconds
    peak = peak_flops(bench.device, "bf16")
    return {
        "layers": recipe.model.num_hidden_layers,
        "parameters": size.parameters_total,
        "parameters_active": size.parameters_active,
        "tokens_per_step": recipe.train.tokens_per_step,
        "seconds": found.seconds,
        "tokens_per_second": rate,
        "mfu": None if peak is None else rate * size.flops_per_token / peak,
        "mfu_goal": MFU_GOALS[model],
        "peak_bytes": found.peak_bytes,
        "profile": _profile(bench, lambda: step(current[0])),
    }


def _profile(bench: Bench, call: Callable[[], object]) -> list[JsonObject]:
    """What took longest in one more step, with its own microseconds.

    Kernels on a GPU, without the operators that launch them; operators on a CPU.
    """
    on_gpu = bench.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *repeat(ProfilerActivity.CUDA, int(on_gpu))]
    with profile(activities=activities) as profiler:
        call()
        if on_gpu:
            torch.cuda.synchronize()
    events = [
        event
        for event in profiler.key_averages()
        # An annotation of the device's time covers the kernels below it.
        if not on_gpu or (event.device_type == DeviceType.CUDA and not event.is_user_annotation)
    ]

    def own(event: object) -> float:
        name = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        return float(getattr(event, name))

    return [
        {"name": event.key[:120], "microseconds": own(event), "calls": event.count}
        for event in sorted(events, key=own, reverse=True)[:ROWS]
    ]
