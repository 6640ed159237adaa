"""A checkpoint's score on a held-out split, beside a bigram that has seen the same windows and is scored on the same targets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data_pipeline.batch import Batch
from data_pipeline.corpora import Corpora
from data_pipeline.loader import open_train_loader, seen_samples, validation_batches
from data_pipeline.packing import Windows
from data_pipeline.split import SplitName
from pretrain.checkpoint.layout import read_state
from pretrain.checkpoint.weights import load_model
from pretrain.config.errors import ConfigError, DataError
from pretrain.config.schema import Recipe
from pretrain.evaluation.bigram import Bigram, bigram_nll, fit_bigram, sample_pairs
from pretrain.evaluation.checkpoint import load_matching_corpora
from pretrain.evaluation.perplexity import Evaluation, evaluate


@dataclass(frozen=True)
class BigramScore:
    """The baseline's result: ``loss`` in nats per token, fitted on ``windows`` distinct training samples."""

    loss: float
    perplexity: float
    windows: int


@dataclass(frozen=True)
class HeldoutScore:
    """A checkpoint's result: ``loss`` in nats per token, ``bits_per_byte`` only where every window of the split was scored."""

    data: str
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
    data: str | Path | None,
    split: SplitName,
    device: torch.device,
    batch_size: int | None = None,
    max_windows: int | None = None,
    with_bigram: bool = True,
) -> HeldoutScore:
    """Scores every window of ``split``, or ``max_windows`` of them spread over it.

    Args:
        data: a data folder; the run's own by default.
        batch_size: windows at once, the recipe's micro batch by default. Where experts drop tokens, the loss depends on it.
        with_bigram: also fit and score the baseline, for which ``data`` must be what the checkpoint was trained on.

    Raises:
        DataError: when ``data`` does not belong to the checkpoint, or the split is too short.
        CheckpointError: when the checkpoint is incomplete or damaged.
    """
    corpora = load_matching_corpora(data, checkpoint)
    state = read_state(checkpoint)
    model, recipe = load_model(checkpoint, device=device)
    bigram = fit_on_seen_samples(corpora, recipe, state) if with_bigram else None
    windows = Windows(corpora.stream(split), recipe.train.sequence_length, corpora.pad_id, recipe.data.document_mask)
    batch_size = batch_size or recipe.train.micro_batch_size
    batches = partial(_batches, windows, batch_size, max_windows)
    evaluation = evaluate(model, batches(f"{split} windows"), device)
    complete = max_windows is None or max_windows >= windows.num_all
    return HeldoutScore(
        data=corpora.place,
        step=state["step"],
        split=split,
        targets=evaluation.targets,
        loss=evaluation.loss,
        perplexity=evaluation.perplexity,
        bits_per_byte=evaluation.bits_per_byte(corpora.utf8_bytes(split)) if complete else None,
        bigram=None if bigram is None else _score_bigram(*bigram, batches("bigram")),
    )


def _batches(windows: Windows, batch_size: int, max_windows: int | None, title: str) -> Iterator[Batch]:
    """Fixed windows, each target once, with a progress bar."""
    count = min(windows.num_all, max_windows or windows.num_all)
    batches = validation_batches(windows, batch_size, 0, 1, max_windows)
    yield from tqdm(batches, total=-(-count // batch_size), desc=title, unit="batch")


def _score_bigram(bigram: Bigram, windows: int, batches: Iterator[Batch]) -> BigramScore:
    nats, targets = bigram_nll(bigram, batches)
    score = Evaluation(nats, targets)
    return BigramScore(score.loss, score.perplexity, windows)


def fit_on_seen_samples(corpora: Corpora, recipe: Recipe, state: dict[str, Any]) -> tuple[Bigram, int]:
    """A bigram of every training sample that the run of a checkpoint with this ``state`` has seen, each once, and the number of these samples.

    Raises:
        DataError: where ``corpora`` is not the data that the run has seen.
    """
    if "plans" not in state["data"]:
        raise DataError("the bigram is fitted on what the model has seen, which a run with data.streaming does not keep: pass --no-bigram")
    length = recipe.train.sequence_length
    seen = seen_samples(state["data"]["plans"], state["consumed_tokens"] // length, length, recipe.seed)
    try:
        loader = open_train_loader(recipe, corpora, 0, 1)
        loader.resume(state["data"], state["step"])
        samples = {name: loader.sources[name].samples for name, numbers in seen.items() if len(numbers)}
    except (ConfigError, DataError, KeyError):
        raise DataError(
            f"the bigram is fitted on what the model has seen, but it was trained on other shards than those in {corpora.place}: "
            "give the run's own with --data, or pass --no-bigram"
        ) from None
    chunks = chain.from_iterable(sample_pairs(samples[name], seen[name]) for name in samples)
    return fit_bigram(chunks, corpora.tokenizer.vocab_size), sum(map(len, seen.values()))
