"""Balancing by bias alone: the load evens out where it would not by itself, and evaluation leaves
the bias as it is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from statistics import mean

import pytest
import torch
from deepspeed.utils import groups

from data_pipeline.loading.batch import Batch
from pretrain.config.load import load_recipe
from pretrain.config.recipe import Recipe
from pretrain.engine.ds_config import resolve_ds_config
from pretrain.engine.engine import Engine
from pretrain.engine.topology import Topology
from pretrain.model.moe.router import TopKRouter

STEPS, VOCAB = 300, 256
NO_LOSS = "aux_loss_weight: 0, z_loss_weight: 0"
# 32 * 64 tokens * top_k 2 / 8 experts = 512 choices an expert a step.
SIZES = [
    f"model.vocab_size={VOCAB}", "model.initializer_range=0.1", "model.num_hidden_layers=1",
    "train.sequence_length=64", "train.micro_batch_size=32", "train.global_batch_size=32",
    f"train.train_tokens={STEPS * 32 * 64}", "logging.tensorboard=false",
    "optimizer.learning_rate=1e-3",
]  # fmt: skip
BALANCED = "bias_balancing: {update_rate: 0.01}"
# Softmax scores are an eighth on average where sigmoid's are a half: so is the step.
FINER = "bias_balancing: {update_rate: 0.0025}"


def recipe_of(router: str, balancing: str) -> Recipe:
    moe = (
        "kind: dropless, num_experts: 8, top_k: 2, moe_intermediate_size: 16, router: {kind:"
        f" {router}}}, {NO_LOSS}, {balancing}"
    )
    return load_recipe("debug", [*SIZES, f"model.moe={{{moe}}}"])


def zipf_batch(step: int) -> Batch:
    """Token frequencies as in text: half of all tokens are 10 of the 256, so that experts are
    chosen unevenly.
    """
    generator = torch.Generator().manual_seed(step)
    frequencies = 1.0 / torch.arange(1, VOCAB + 1)
    tokens = torch.multinomial(frequencies, 32 * 65, replacement=True, generator=generator).view(
        32, 65
    )
    tokens[:, 1::2] = (tokens[:, :-1:2] * 7 + 3) % VOCAB
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), None)


def engine_of(recipe: Recipe, topology: Topology) -> Engine:
    groups._EXPERT_PARALLEL_GROUP, groups._EXPERT_DATA_PARALLEL_GROUP = {}, {}
    return Engine(
        recipe,
        resolve_ds_config({"zero_optimization": {"stage": 0}}, "the test", recipe, "fp32", 1, 1),
        "fp32",
        topology,
    )


def violations(recipe: Recipe, topology: Topology) -> Iterator[float]:
    """MaxVio (Wang et al. 2024) of each step: how far the busiest expert is above the mean load."""
    engine = engine_of(recipe, topology)
    assert recipe.model.moe is not None
    rate = recipe.model.moe.bias_balancing.update_rate if recipe.model.moe.bias_balancing else 0.0
    for step in range(STEPS):
        router = engine.train_step([zipf_batch(step)], 1.0, rate).router
        assert router is not None
        shares_E = router.counts_LE[0] / router.counts_LE[0].sum()
        yield shares_E.max().item() * 8 - 1


def twenty_step_means(recipe: Recipe, topology: Topology) -> Iterator[float]:
    last: deque[float] = deque(maxlen=20)
    for violation in violations(recipe, topology):
        last.append(violation)
        if len(last) == 20:
            yield mean(last)


@pytest.mark.parametrize("router,balancing", [("sigmoid_topk", BALANCED), ("softmax_topk", FINER)])
def test_the_bias_alone_balances_within_300_steps(
    router: str, balancing: str, topology: Topology
) -> None:
    assert any(found < 0.2 for found in twenty_step_means(recipe_of(router, balancing), topology))


def test_without_any_balancing_the_load_stays_uneven(topology: Topology) -> None:
    assert min(twenty_step_means(recipe_of("sigmoid_topk", "bias_balancing: null"), topology)) > 0.4


def test_evaluation_moves_no_bias_and_a_frozen_rate_neither(topology: Topology) -> None:
    engine = engine_of(recipe_of("sigmoid_topk", BALANCED), topology)
    routers = [module for module in engine.model.modules() if isinstance(module, TopKRouter)]
    engine.train_step([zipf_batch(0)], 1.0, 0.01)
    before = [router.balance_bias.tolist() for router in routers]
    assert len(before) == 1 and all(any(bias) for bias in before)
    engine.evaluate([zipf_batch(1)])
    engine.train_step([zipf_batch(2)], 1.0, 0.0)
    assert [router.balance_bias.tolist() for router in routers] == before
