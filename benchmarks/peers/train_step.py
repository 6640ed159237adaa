"""One optimizer step of two micro batches on one rank, and the start until the first one."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from peers.measure import Measured, fast_format, seconds_of_flops, since_the_start, timed
from peers.models import (
    LEARNING_RATE,
    LENGTH,
    MICRO_BATCH,
    MICRO_BATCHES,
    recipe_of,
    token_batches,
    transformers_loss,
    transformers_model,
)
from pretrain.config.recipe import Recipe
from pretrain.engine.cpu_tuning import tune_for_training
from pretrain.engine.precision import DTYPES

WARM_UP, STEPS = 6, 8
Step = Callable[[list[torch.Tensor]], object]


def our_step(recipe: Recipe) -> Step:
    """This project's engine at ZeRO 1, on as many ranks as this process was started with."""
    from data_pipeline.loading.batch import Batch
    from pretrain.config.rules.sections import check_topology
    from pretrain.engine.ds_config import resolve_ds_config
    from pretrain.engine.engine import Engine
    from pretrain.engine.topology import connect

    precision = recipe.train.precision
    topology = connect(recipe.parallel.ep_size)
    accumulation = check_topology(recipe, topology.world_size, 1)
    zero = {"zero_optimization": {"stage": 1}}
    ds_config = resolve_ds_config(zero, "-", recipe, precision, accumulation, topology.world_size)
    engine = Engine(recipe, ds_config, precision, topology)

    def step(micro_batches: list[torch.Tensor]) -> None:
        batches = [
            Batch(ids_BS[:, :-1].contiguous(), ids_BS[:, 1:].contiguous())
            for ids_BS in micro_batches
        ]
        engine.train_step(batches, 1.0)

    return step


def transformers_adamw_step(recipe: Recipe) -> Step:
    """transformers' model and torch's fused AdamW in the model's precision, without masters."""
    model = transformers_model(recipe, DTYPES[recipe.train.precision])
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)

    def step(micro_batches: list[torch.Tensor]) -> None:
        for ids_BS in micro_batches:
            (transformers_loss(model, ids_BS[:, :-1]) / MICRO_BATCHES).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def transformers_zero_step(recipe: Recipe) -> Step:
    """transformers' model under DeepSpeed's ZeRO 1: fp32 masters, as ours."""
    import deepspeed

    from pretrain.engine.topology import free_port

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(free_port())
    # Else DeepSpeed compiles an operation for collectives in shared memory, for minutes.
    from pretrain.engine.workarounds.shared_memory_all_reduce import avoid_shared_memory_all_reduce

    avoid_shared_memory_all_reduce()
    deepspeed.init_distributed("gloo")
    model = transformers_model(recipe, torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": MICRO_BATCH,
            "gradient_accumulation_steps": MICRO_BATCHES,
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": 1},
            "bf16": {"enabled": recipe.train.precision == "bf16"},
        },
    )

    def step(micro_batches: list[torch.Tensor]) -> None:
        for ids_BS in micro_batches:
            engine.backward(transformers_loss(engine, ids_BS[:, :-1]))
            engine.step()

    return step


def plain_step(recipe: Recipe) -> Step:
    """Our model in a plain loop of PyTorch, with fp32 masters and without DeepSpeed.

    With our settings for CPUs, so that the difference is DeepSpeed's share of a step.
    """
    from pretrain.model.decoder import DecoderLM
    from pretrain.model.init import initialize

    tune_for_training()
    model = DecoderLM(recipe.model)
    initialize(model, recipe.seed)
    masters = [parameter.detach().clone().requires_grad_() for parameter in model.parameters()]
    model.to(DTYPES[recipe.train.precision])
    working = list(model.parameters())
    optimizer = torch.optim.AdamW(masters, lr=LEARNING_RATE, fused=True)
    normalizer = float(MICRO_BATCH * LENGTH)

    def step(micro_batches: list[torch.Tensor]) -> None:
        for ids_BS in micro_batches:
            loss = model(ids_BS[:, :-1], ids_BS[:, 1:], normalizer).loss
            (loss / MICRO_BATCHES).backward()
        for master, parameter in zip(masters, working, strict=True):
            assert parameter.grad is not None
            master.grad = parameter.grad.float()
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(masters, working, strict=True):
                parameter.copy_(master)
                parameter.grad = None

    return step


def step_side(
    prepare: Callable[[Recipe], Step],
    *overrides: str,
    ranks: int = 1,
    warm_up: int = WARM_UP,
    steps: int = STEPS,
) -> Callable[[], Measured]:
    """A side that measures the steps of one way to train, or this rank's part of them."""

    def side() -> Measured:
        torch.manual_seed(0)
        recipe = recipe_of(*overrides)
        train = recipe.train
        micro_batches = train.global_batch_size // (train.micro_batch_size * ranks)
        step, batches = prepare(recipe), token_batches(recipe, micro_batches)
        current: list[Any] = []

        def load() -> None:
            current[:] = [next(batches)]

        return timed(
            lambda: step(current[0]),
            warm_up=warm_up,
            repeats=steps,
            prepare=load,
            floor_seconds=floor_of(recipe),
        )

    return side


def floor_of(recipe: Recipe) -> float:
    """CPU seconds of the products of a step, of all ranks."""
    from pretrain.model.sizes import model_size

    per_token = model_size(recipe.model, recipe.train.sequence_length).flops_per_token
    return seconds_of_flops(
        per_token * recipe.train.tokens_per_step,
        DTYPES[recipe.train.precision],
    )


def start_side(prepare: Callable[[Recipe], Step]) -> Callable[[], Measured]:
    """A side that measures a process from its beginning to the end of its first step."""

    def side() -> Measured:
        recipe = recipe_of(f"train.precision={fast_format()}")
        prepare(recipe)(next(token_batches(recipe, MICRO_BATCHES)))
        return since_the_start()

    return side
