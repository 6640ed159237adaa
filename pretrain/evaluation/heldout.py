"""A checkpoint's score on a held-out split, beside a bigram that has seen the same windows and is scored on the same targets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data_pipeline.loader import Batch, Windows, open_split, validation_batches
from data_pipeline.manifest import Manifest
from data_pipeline.split import SplitName
from pretrain.checkpoint.layout import read_state
from pretrain.checkpoint.weights import load_model
from pretrain.config.errors import DataError
from pretrain.config.schema import Recipe
from pretrain.evaluation.bigram import Bigram, bigram_nll, fit_bigram, seen_windows, window_pairs
from pretrain.evaluation.checkpoint import load_matching_manifest
from pretrain.evaluation.perplexity import Evaluation, evaluate


@dataclass(frozen=True)
class BigramScore:
    """The baseline's result: ``loss`` in nats per token, fitted on ``windows`` distinct training windows."""

    loss: float
    perplexity: float
    windows: int


@dataclass(frozen=True)
class HeldoutScore:
    """A checkpoint's result: ``loss`` in nats per token, ``bits_per_byte`` only where every window of the split was scored."""

    step: int
    split: str
    targets: int
    loss: float
    perplexity: float
    bits_per_byte: float | None
    bigram: BigramScore | None

    @property
    def better_by(self) -> float | None:
        """Nats per token by which the model beats the bigram; negative where it does not."""
        return None if self.bigram is None else self.bigram.loss - self.loss

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "better_than_bigram_by": self.better_by}


def score_checkpoint(
    checkpoint: Path,
    data: Path,
    split: SplitName,
    device: torch.device,
    batch_size: int | None = None,
    max_windows: int | None = None,
    with_bigram: bool = True,
) -> HeldoutScore:
    """Scores every window of ``split``, or ``max_windows`` of them spread over it.

    Args:
        batch_size: windows at once, the recipe's micro batch by default. Where experts drop tokens, the loss depends on it.
        with_bigram: also fit and score the baseline, for which ``data`` must be what the checkpoint was trained on.

    Raises:
        DataError: when ``data`` does not belong to the checkpoint, or the split is too short.
        CheckpointError: when the checkpoint is incomplete or damaged.
    """
    manifest = load_matching_manifest(data, checkpoint)
    state = read_state(checkpoint)
    if with_bigram and manifest.fingerprint != state["data_fingerprint"]:
        raise DataError(
            f"the bigram is fitted on what the model has seen, but {checkpoint} was trained on other shards than those in {data}: "
            "give the run's own with --data, or pass --no-bigram"
        )
    model, recipe = load_model(checkpoint, device=device)
    windows = Windows(open_split(data, manifest, split), recipe.train.sequence_length)
    batch_size = batch_size or recipe.train.micro_batch_size
    batches = partial(_batches, windows, batch_size, max_windows, recipe.data.document_mask, manifest.tokenizer.eod_id)
    evaluation = evaluate(model, batches(f"{split} windows"), device)
    complete = max_windows is None or max_windows >= windows.num_all
    return HeldoutScore(
        step=state["step"],
        split=split,
        targets=evaluation.targets,
        loss=evaluation.loss,
        perplexity=evaluation.perplexity,
        bits_per_byte=evaluation.bits_per_byte(manifest.splits[split].utf8_bytes) if complete else None,
        bigram=_score_bigram(data, manifest, recipe, state["consumed_tokens"], batches("bigram")) if with_bigram else None,
    )


def _batches(windows: Windows, batch_size: int, max_windows: int | None, document_mask: bool, eod_id: int, title: str) -> Iterator[Batch]:
    """Fixed windows, each target once, with a progress bar."""
    count = min(windows.num_all, max_windows or windows.num_all)
    batches = validation_batches(windows, batch_size, 0, 1, max_windows, document_mask, eod_id)
    yield from tqdm(batches, total=-(-count // batch_size), desc=title, unit="batch")


def _score_bigram(data: Path, manifest: Manifest, recipe: Recipe, consumed_tokens: int, batches: Iterator[Batch]) -> BigramScore:
    bigram, windows = fit_on_seen_windows(data, manifest, recipe, consumed_tokens)
    nats, targets = bigram_nll(bigram, batches)
    score = Evaluation(nats, targets)
    return BigramScore(score.loss, score.perplexity, windows)


def fit_on_seen_windows(data: Path, manifest: Manifest, recipe: Recipe, consumed_tokens: int) -> tuple[Bigram, int]:
    """A bigram of every training window that the run has seen after ``consumed_tokens``, each once, and the number of these windows."""
    sequence_length = recipe.train.sequence_length
    stream = open_split(data, manifest, "train")
    windows = seen_windows(consumed_tokens // sequence_length, Windows(stream, sequence_length).num_full, recipe.seed)
    masked = manifest.tokenizer.eod_id if recipe.data.document_mask else None
    return fit_bigram(window_pairs(stream, windows, sequence_length, masked), manifest.tokenizer.vocab_size), len(windows)
