from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from data_pipeline.loading.batch import Batch
from pretrain.config.load import load_recipe
from pretrain.core.errors import DataError, NonFiniteError
from pretrain.evaluation.heldout.perplexity import Evaluation, evaluate
from pretrain.model.decoder import DecoderLM

CPU = torch.device("cpu")


@pytest.fixture
def model() -> DecoderLM:
    torch.manual_seed(0)
    decoder = DecoderLM(load_recipe("debug", ["model.vocab_size=100"]).model)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2)
    return decoder


def text(rows: int) -> tuple[Tensor, Tensor]:
    tokens_BS = torch.randint(100, (rows, 33), generator=torch.Generator().manual_seed(1))
    labels_BS = tokens_BS[:, 1:].clone()
    labels_BS[0, 3:9] = -100
    return tokens_BS[:, :-1], labels_BS


def batches(rows: int, batch_size: int) -> list[Batch]:
    return [
        Batch(inputs, labels)
        for inputs, labels in zip(*(side.split(batch_size) for side in text(rows)), strict=True)
    ]


@torch.inference_mode()
def by_definition(model: DecoderLM, rows: int) -> float:
    """-log p of each label, one window and one position at a time."""
    inputs_BS, labels_BS = text(rows)
    nats = 0.0
    for input_S, label_S in zip(inputs_BS, labels_BS, strict=True):
        for place, label in enumerate(label_S.tolist()):
            if label != -100:
                nats -= float(
                    model.eval()
                    .logits(input_S[None, : place + 1])[0, -1]
                    .double()
                    .log_softmax(0)[label]
                )
    return nats


def test_the_loss_is_the_mean_negative_log_likelihood_of_every_target(model: DecoderLM) -> None:
    evaluation = evaluate(model, batches(3, 3), CPU)
    assert evaluation.targets == 3 * 32 - 6
    assert evaluation.nats == pytest.approx(by_definition(model, 3), rel=1e-6)
    assert evaluation.loss == evaluation.nats / evaluation.targets
    assert evaluation.perplexity == pytest.approx(math.exp(evaluation.loss))


def test_labels_shifted_by_one_do_not_give_that_loss(model: DecoderLM) -> None:
    inputs_BS, labels_BS = text(3)
    shifted = evaluate(model, [Batch(inputs_BS, labels_BS.roll(1, dims=1))], CPU)
    assert abs(shifted.nats / by_definition(model, 3) - 1) > 1e-3


def test_the_loss_does_not_depend_on_the_batch_size(model: DecoderLM) -> None:
    whole, split = evaluate(model, batches(5, 5), CPU), evaluate(model, batches(5, 2), CPU)
    assert whole.targets == split.targets and whole.nats == pytest.approx(split.nats, rel=1e-6)


def test_masked_documents_are_scored_as_if_they_stood_alone(model: DecoderLM) -> None:
    inputs_BS, labels_BS = text(2)
    documents_BS = (torch.arange(32) >= 12).long().expand(2, -1)
    masked = evaluate(model, [Batch(inputs_BS, labels_BS, documents_BS)], CPU)
    first = evaluate(model, [Batch(inputs_BS[:, :12], labels_BS[:, :12])], CPU)
    assert masked.targets == 2 * 32 - 6
    assert abs(masked.nats - evaluate(model, [Batch(inputs_BS, labels_BS)], CPU).nats) > 1e-2
    only_first = labels_BS.clone()
    only_first[:, 12:] = -100
    assert evaluate(model, [Batch(inputs_BS, only_first, documents_BS)], CPU).nats == pytest.approx(
        first.nats, rel=1e-6
    )


def test_a_model_that_knows_nothing_has_the_entropy_of_the_vocabulary(model: DecoderLM) -> None:
    with torch.no_grad():
        model.head.weight.zero_()
    evaluation = evaluate(model, batches(3, 2), CPU)
    assert evaluation.loss == pytest.approx(math.log(100), rel=1e-6)
    assert evaluation.bits_per_byte(utf8_bytes=45) == pytest.approx(90 * math.log2(100) / 45)


def test_evaluation_leaves_the_model_in_its_mode(model: DecoderLM) -> None:
    evaluate(model.train(), batches(1, 1), CPU)
    assert model.training
    evaluate(model.eval(), batches(1, 1), CPU)
    assert not model.training


def test_nothing_to_score_and_non_finite_losses_are_errors(model: DecoderLM) -> None:
    inputs_BS, labels_BS = text(1)
    with pytest.raises(DataError, match="no target"):
        evaluate(model, [Batch(inputs_BS, torch.full_like(labels_BS, -100))], CPU)
    with torch.no_grad():
        model.final_norm.weight.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="take an earlier checkpoint"):
        evaluate(model, batches(1, 1), CPU)


def test_an_enormous_loss_has_a_perplexity_of_infinity() -> None:
    assert Evaluation(nats=1e6, targets=1).perplexity == math.inf
