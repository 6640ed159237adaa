"""Loss, perplexity and bits per byte of a model on fixed windows of held-out text."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from data_pipeline.batch import NO_LOSS, Batch
from pretrain.config.errors import DataError, NonFiniteError
from pretrain.model.decoder import DecoderLM


@dataclass(frozen=True)
class Evaluation:
    """A model's summed loss, and what follows from it."""

    nats: float
    targets: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.targets

    @property
    def perplexity(self) -> float:
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf

    def bits_per_byte(self, utf8_bytes: int) -> float:
        """Summed bits over the UTF-8 bytes of the documents: comparable between tokenizers (Gao et al. 2020, "The Pile", section 3.1).

        ``nats`` must cover the whole split. The very first token of a split has no context and is not scored, and where documents are
        masked from each other neither is the first token of any; their bytes are in ``utf8_bytes`` all the same.
        """
        return self.nats / math.log(2) / utf8_bytes


@torch.inference_mode()
def evaluate(model: DecoderLM, batches: Iterable[Batch], device: torch.device) -> Evaluation:
    """Scores every target of ``batches`` (a label of -100 is none); per-token losses are fp32, their sum fp64.

    Raises:
        DataError: when no label is a target.
        NonFiniteError: when the sum is not a finite number.
    """
    was_training = model.training
    model.eval()
    # The sum stays on the device until the end, so that no batch waits for a copy.
    nats = torch.zeros((), dtype=torch.float64, device=device)
    targets = 0
    for batch in batches:
        targets += int((batch.labels_BS != NO_LOSS).sum())
        moved = batch.to(device)
        logits_BSV = model.logits(moved.input_ids_BS, moved.document_ids_BS, position_ids_BS=moved.position_ids_BS)
        losses_T = F.cross_entropy(logits_BSV.flatten(0, 1), moved.labels_BS.flatten(), ignore_index=NO_LOSS, reduction="none")
        nats += losses_T.double().sum()
    model.train(was_training)
    if targets == 0:
        raise DataError("there is nothing to evaluate: the windows hold no target; choose a longer split")
    evaluation = Evaluation(nats=float(nats), targets=targets)
    if not math.isfinite(evaluation.nats):
        raise NonFiniteError(f"the loss over {targets} targets is {evaluation.nats}: the weights diverged; take an earlier checkpoint")
    return evaluation
