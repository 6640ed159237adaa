"""The engine against an independent plain-PyTorch form of the same training run: same losses, same
gradient norms, step by step.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from deepspeed.utils import groups
from torch import Tensor

from data_pipeline.loading.batch import Batch
from pretrain.config.load import load_recipe
from pretrain.config.recipe import Recipe
from pretrain.config.timeline import Timeline
from pretrain.engine.ds_config import resolve_ds_config
from pretrain.engine.engine import Engine
from pretrain.engine.topology import Topology
from pretrain.model.decoder import DecoderLM
from pretrain.model.init import initialize
from pretrain.optim.config import AdamWConfig
from tests.support.plain_moe import MicroBatch, PlainMoE, PlainSettings, PlainStep

STEPS = 50
OVERRIDES = [
    "model.vocab_size=100", "model.initializer_range=0.1", "model.moe.aux_loss_weight=0.05",
    "model.moe.z_loss_weight=0.01",
    "train.sequence_length=16", "train.micro_batch_size=2", "train.global_batch_size=6",
    f"train.train_tokens={STEPS * 6 * 16}",
    "train.grad_clip=0.5", "schedule.warmup_steps=5", "logging.tensorboard=false",
]  # fmt: skip
# Uneven numbers of counted tokens, attention inside documents, and a load counted over the global
# batch. With so large an eps AdamW's step grows with the gradient, where usually it would hide by
# what factor all gradients are clipped.
DOCUMENTS = [
    *OVERRIDES,
    "data.document_mask=true",
    "model.moe.balance_scope=global_batch",
    "optimizer.eps=0.1",
    "optimizer.learning_rate=0.3",
]


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("debug", OVERRIDES)


@pytest.fixture(scope="module")
def document_recipe() -> Recipe:
    return load_recipe("debug", DOCUMENTS)


@pytest.fixture(scope="module")
def batches(recipe: Recipe) -> list[list[MicroBatch]]:
    return [micro_batches(recipe, step) for step in range(STEPS)]


@pytest.fixture(scope="module")
def document_batches(document_recipe: Recipe) -> list[list[MicroBatch]]:
    return [micro_batches(document_recipe, step) for step in range(10)]


@pytest.fixture(scope="module")
def oracle_run(recipe: Recipe, batches: list[list[MicroBatch]]) -> list[PlainStep]:
    return run_oracle(PlainMoE, recipe, batches)


@pytest.fixture(scope="module")
def document_oracle_run(
    document_recipe: Recipe, document_batches: list[list[MicroBatch]]
) -> list[PlainStep]:
    return run_oracle(PlainMoE, document_recipe, document_batches)


def micro_batches(recipe: Recipe, step: int) -> list[MicroBatch]:
    """Random tokens of which every second one follows from the one before, so that there is
    something to learn.
    """
    train, vocab_size = recipe.train, recipe.model.vocab_size
    assert vocab_size is not None
    tokens = torch.randint(
        0,
        vocab_size,
        (train.global_batch_size, train.sequence_length + 1),
        generator=torch.Generator().manual_seed(step),
    )
    tokens[:, 1::2] = (tokens[:, :-1:2] * 7 + 3) % vocab_size
    return [
        micro_batch(part, recipe.data.document_mask)
        for part in tokens.split(train.micro_batch_size)
    ]


def micro_batch(tokens: Tensor, document_mask: bool) -> MicroBatch:
    """Inputs and labels of [B, S + 1] tokens; with documents, every token below 20 ends one and has
    no loss.
    """
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    if not document_mask:
        return inputs, labels, None
    ends = inputs < 20
    return inputs, labels.masked_fill(ends, -100), ends.cumsum(dim=1) - ends.long()


def plain_settings(recipe: Recipe) -> PlainSettings:
    model, optimizer, moe = recipe.model, recipe.optimizer, recipe.model.moe
    assert isinstance(optimizer, AdamWConfig) and moe is not None and model.vocab_size is not None
    return PlainSettings(
        num_layers=model.num_hidden_layers,
        head_dim=model.attention.head_dim,
        rope_theta=model.position.rope_theta,
        norm_eps=model.norm.eps,
        vocab_size=model.vocab_size,
        top_k=moe.top_k,
        aux_loss_weight=moe.aux_loss_weight,
        z_loss_weight=moe.z_loss_weight,
        global_balance=moe.balance_scope == "global_batch",
        learning_rate=optimizer.learning_rate,
        beta1=optimizer.beta1,
        beta2=optimizer.beta2,
        adam_eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        max_norm=recipe.train.grad_clip,
        warmup_steps=recipe.schedule.warmup_steps,
        num_steps=Timeline(recipe).num_steps,
        final_ratio=recipe.schedule.min_learning_rate_ratio,
    )


def run_oracle(
    kind: type[PlainMoE], recipe: Recipe, batches: list[list[MicroBatch]]
) -> list[PlainStep]:
    model = DecoderLM(recipe.model)
    initialize(model, recipe.seed)
    oracle = kind(model.state_dict(), plain_settings(recipe))
    return [oracle.train_step(step_batches, step) for step, step_batches in enumerate(batches)]


def run_engine(
    recipe: Recipe, zero_stage: int, topology: Topology, batches: list[list[MicroBatch]]
) -> list[PlainStep]:
    groups._EXPERT_PARALLEL_GROUP, groups._EXPERT_DATA_PARALLEL_GROUP = {}, {}
    ds_config = resolve_ds_config(
        {"zero_optimization": {"stage": zero_stage}}, "the test", recipe, "fp32", len(batches[0]), 1
    )
    engine = Engine(recipe, ds_config, "fp32", topology)
    steps = []
    for step, step_batches in enumerate(batches):
        factor = recipe.schedule.factor(step, Timeline(recipe).num_steps)
        result = engine.train_step([Batch(*micro_batch) for micro_batch in step_batches], factor)
        cross_entropy, loss = result.losses.packed().tolist()
        steps.append(PlainStep(cross_entropy, loss, result.grad_norm))
    return steps


def difference(run: list[PlainStep], reference: list[PlainStep], steps: int) -> float:
    """Largest relative difference of the losses and of the gradient norm over the first ``steps``
    steps.
    """
    pairs = [
        (getattr(one, field), getattr(other, field))
        for one, other in zip(run[:steps], reference[:steps])
        for field in ("cross_entropy", "loss", "grad_norm")
    ]
    return max(abs(one - other) / abs(other) for one, other in pairs)


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_engine_trains_as_the_formulas_say(
    zero_stage: int,
    recipe: Recipe,
    topology: Topology,
    batches: list[list[MicroBatch]],
    oracle_run: list[PlainStep],
) -> None:
    run = run_engine(recipe, zero_stage, topology, batches)
    assert difference(run, oracle_run, steps=10) <= 1e-6
    assert difference(run, oracle_run, steps=STEPS) <= 1e-5


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_documents_a_global_load_and_clipping_are_weighed_as_the_formulas_say(
    zero_stage: int,
    document_recipe: Recipe,
    topology: Topology,
    document_batches: list[list[MicroBatch]],
    document_oracle_run: list[PlainStep],
) -> None:
    counted = {int((labels >= 0).sum()) for step in document_batches for _, labels, _ in step}
    assert len(counted) > 3  # else a mean of means would be the mean
    run = run_engine(document_recipe, zero_stage, topology, document_batches)
    assert difference(run, document_oracle_run, steps=10) <= 1e-6


def test_the_runs_learn_and_clip(
    oracle_run: list[PlainStep], document_oracle_run: list[PlainStep], recipe: Recipe
) -> None:
    """Else equality over the steps would say little."""
    assert min(step.grad_norm for step in document_oracle_run) > recipe.train.grad_clip
    assert oracle_run[-1].cross_entropy < 0.9 * oracle_run[0].cross_entropy
    assert min(step.grad_norm for step in oracle_run) > recipe.train.grad_clip


class FutureVisible(PlainMoE):
    def visible(self, S: int, documents_BS: Tensor | None) -> Tensor:
        return torch.ones(1, 1, S, S, dtype=torch.bool).tril(diagonal=1)


class ExpertGradientScaled(PlainMoE):
    def gradients(self) -> dict[str, Tensor]:
        gradients = super().gradients()
        gradients["layers.1.feed_forward.experts.w2"][2] *= 1.01
        return gradients


class NormDecayed(PlainMoE):
    def is_decayed(self, name: str) -> bool:
        return name == "final_norm.weight" or super().is_decayed(name)


@pytest.mark.parametrize("fault", [FutureVisible, ExpertGradientScaled, NormDecayed])
def test_a_faulty_oracle_is_told_apart(
    fault: type[PlainMoE],
    recipe: Recipe,
    batches: list[list[MicroBatch]],
    oracle_run: list[PlainStep],
) -> None:
    faulty = run_oracle(fault, recipe, batches[:5])
    assert difference(faulty, oracle_run, steps=5) > 1e-6


class DocumentsMixed(PlainMoE):
    def visible(self, S: int, documents_BS: Tensor | None) -> Tensor:
        return super().visible(S, None)


class MeanOfMeans(PlainMoE):
    def counted_tokens(self, micro_batches: Sequence[MicroBatch]) -> list[float]:
        return [float((labels >= 0).sum()) * len(micro_batches) for _, labels, _ in micro_batches]


class LoadOfMicroBatch(PlainMoE):
    def global_fractions(self, micro_batches: Sequence[MicroBatch]) -> Tensor | None:
        return None


class ClippedTooLittle(PlainMoE):
    def clip_factor(self, norm: float) -> float:
        return 1.001 * super().clip_factor(norm)


@pytest.mark.parametrize("fault", [DocumentsMixed, MeanOfMeans, LoadOfMicroBatch, ClippedTooLittle])
def test_an_oracle_with_faulty_documents_load_or_clipping_is_told_apart(
    fault: type[PlainMoE],
    document_recipe: Recipe,
    document_batches: list[list[MicroBatch]],
    document_oracle_run: list[PlainStep],
) -> None:
    faulty = run_oracle(fault, document_recipe, document_batches[:3])
    assert difference(faulty, document_oracle_run, steps=3) > 1e-6
