"""Loss, perplexity, bits per byte and accuracy of a model on windows of held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.loading.batch import NO_LOSS, Batch
from pretrain.core.errors import DataError, NonFiniteError
from pretrain.model.decoder import DecoderLM

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The logits [B, S, V] of a batch on the model's device, each of the token after.
BatchLogits = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Evaluation:
    """A model's summed loss, and what follows from it.

    ``correct`` counts targets that were the likeliest token.
    """

    nats: float
    targets: int
    correct: int = 0

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.targets

    @property
    def perplexity(self) -> float:
        """``exp(loss)``; infinite if that is no float."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf

    @property
    def accuracy(self) -> float:
        """Share of targets that were the likeliest token."""
        return self.correct / self.targets

    def bits_per_byte(self, utf8_bytes: int) -> float:
        """Summed bits over the UTF-8 bytes of the documents (Gao et al. 2020, section 3.1).

        It is comparable between tokenizers. ``nats`` must cover the whole split. The first token of
        a split has no context and is not scored; if documents are masked from each other, neither
        is the first token of any. Their bytes count in ``utf8_bytes`` all the same.
        """
        return self.nats / math.log(2) / utf8_bytes


def native_logits(model: DecoderLM) -> BatchLogits:
    """One of our models, as it is trained: with the batch's document mask."""
    return lambda batch: model.logits(
        batch.input_ids_BS, batch.document_ids_BS, position_ids_BS=batch.position_ids_BS
    )


def transformers_logits(model: PreTrainedModel) -> BatchLogits:
    """A Hugging Face model.

    transformers derives the document mask from positions that start again at 0.
    """

    def logits(batch: Batch) -> Tensor:
        positions = {} if batch.document_ids_BS is None else {"position_ids": batch.position_ids_BS}
        logits_BSV: Tensor = model(
            # A cache would only take memory: every window is one call.
            input_ids=batch.input_ids_BS,
            use_cache=False,
            **positions,
        ).logits
        # A model in bf16 gives bf16 logits, whose log-softmax would be off in the second digit.
        return logits_BSV.float()

    return logits


@torch.inference_mode()
def score_batches(
    logits_of: BatchLogits, batches: Iterable[Batch], device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Scores each target of each batch.

    Yields -log p in nats, fp64 [B, S], and whether the target was the likeliest token; both are 0
    for labels that are no targets.
    """
    for batch in batches:
        moved = batch.to(device)
        logits_BSV = logits_of(moved)
        labels_BS = moved.labels_BS
        losses_T = F.cross_entropy(
            logits_BSV.flatten(0, 1), labels_BS.flatten(), ignore_index=NO_LOSS, reduction="none"
        )
        # Labels are shifted already: logits at position s are compared with labels at s. No
        # prediction equals -100: labels that are no targets count as wrong, and have the loss 0.
        yield losses_T.double().view_as(labels_BS), logits_BSV.argmax(dim=-1) == labels_BS


def evaluate(model: DecoderLM, batches: Iterable[Batch], device: torch.device) -> Evaluation:
    """Scores every target of ``batches``, which is every label but -100.

    Raises:
        DataError: if no label is a target.
        NonFiniteError: if the sum is not a finite number.
    """
    # Dropout off; router noise and capacity as in evaluation.
    was_training = model.training
    model.eval()
    # Sums stay on the device until the end, so that no batch waits for a copy.
    nats = torch.zeros((), dtype=torch.float64, device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    targets = 0

    def counted() -> Iterator[Batch]:
        nonlocal targets
        for batch in batches:
            targets += int((batch.labels_BS != NO_LOSS).sum())
            yield batch

    for nats_BS, correct_BS in score_batches(native_logits(model), counted(), device):
        nats += nats_BS.sum()
        correct += correct_BS.sum()
    model.train(was_training)
    return checked(Evaluation(float(nats), targets, int(correct)))


def checked(evaluation: Evaluation) -> Evaluation:
    """Raises :class:`DataError` without any target, :class:`NonFiniteError` for NaN or inf."""
    if evaluation.targets == 0:
        raise DataError(
            "there is nothing to evaluate: the windows hold no target; choose a longer split"
        )
    if not math.isfinite(evaluation.nats):
        raise NonFiniteError(
            f"the loss over {evaluation.targets} targets is {evaluation.nats}: the weights"
            " diverged; take an earlier checkpoint"
        )
    return evaluation
