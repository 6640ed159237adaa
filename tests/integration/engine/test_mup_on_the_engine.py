"""muP on DeepSpeed's engine: every ZeRO stage trains a wide model as a plain loop does, and at the
base widths exactly as the standard kind.
"""

from __future__ import annotations

import pytest
import torch

from data_pipeline.loading.batch import Batch
from pretrain.analysis.coordinates import PlainTraining, random_batches
from pretrain.config.load import load_recipe
from pretrain.config.recipe import Recipe
from pretrain.engine.ds_config import resolve_ds_config
from pretrain.engine.engine import Engine
from pretrain.engine.topology import Topology

STEPS = 4
WIDTHS = (
    "{hidden_size: %d, num_attention_heads: 4, num_key_value_heads: 2, head_dim: %d,"
    " moe_intermediate_size: %d}"
)
BASE = f"model.initialization={{kind: mup, base: {WIDTHS}}}"
SIZES = [
    "model.vocab_size=100",
    "model.initializer_range=0.1",
    "model.moe.moe_intermediate_size=32",
    "model.tie_word_embeddings=true",
]
TRAIN = [
    "train.sequence_length=16",
    "train.global_batch_size=4",
    "logging.tensorboard=false",
    "optimizer.learning_rate=1e-2",
]
WIDE, AT_BASE = BASE % (8, 2, 8), BASE % (32, 8, 32)


def recipe_of(*overrides: str) -> Recipe:
    return load_recipe("debug", [*SIZES, *TRAIN, *overrides])


def batches(recipe: Recipe) -> list[list[Batch]]:
    return [random_batches(recipe, step) for step in range(STEPS)]


def on_the_engine(
    recipe: Recipe, zero_stage: int, topology: Topology
) -> tuple[list[float], Engine]:
    accumulation = recipe.train.global_batch_size // recipe.train.micro_batch_size
    config = resolve_ds_config(
        {"zero_optimization": {"stage": zero_stage}}, "test", recipe, "fp32", accumulation, 1
    )
    engine = Engine(recipe, config, "fp32", topology)
    results = [engine.train_step(step, 1.0) for step in batches(recipe)]
    return [float(result.losses.cross_entropy) for result in results], engine


@pytest.fixture(scope="module")
def plain() -> list[float]:
    training = PlainTraining(recipe_of(WIDE))
    return [training.step(step) for step in batches(training.recipe)]


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_every_stage_trains_a_wide_model_as_the_plain_loop_does(
    zero_stage: int, topology: Topology, plain: list[float]
) -> None:
    found, engine = on_the_engine(recipe_of(WIDE), zero_stage, topology)
    assert found == pytest.approx(plain, rel=1e-6)
    assert engine.learning_rate() == 1e-2


def test_training_with_the_narrow_models_rates_is_another_one(
    topology: Topology, plain: list[float]
) -> None:
    """The same weights, every learning rate as it is at the base."""
    training = PlainTraining(recipe_of(WIDE))
    for group in training.optimizer.param_groups:
        group.pop("learning_rate_scale", None)
    assert [training.step(step) for step in batches(training.recipe)] != pytest.approx(
        plain, rel=1e-4
    )


def test_at_the_base_widths_training_is_bitwise_that_of_the_standard_kind(
    topology: Topology,
) -> None:
    (standard, one), (mup, other) = (
        on_the_engine(recipe_of(*kind), 1, topology) for kind in ((), (AT_BASE,))
    )
    assert standard == mup
    for name, parameter in one.model.named_parameters():
        assert torch.equal(
            one.masters.whole(parameter), other.masters.whole(other.model.get_parameter(name))
        ), name
