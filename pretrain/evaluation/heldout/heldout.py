"""A model's score on a held-out split, by source and by length, and baselines on the same text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data_pipeline.loading.batch import NO_LOSS, Batch
from data_pipeline.loading.megatron.loader import MegatronLoader, open_megatron_loader
from data_pipeline.loading.saved import read_saved
from data_pipeline.loading.seen_samples import seen_samples
from data_pipeline.loading.shard_loader import SavedPosition, ShardLoader, open_shard_loader
from data_pipeline.loading.validation import validation_batches
from data_pipeline.shards.datasets import Datasets
from data_pipeline.shards.split import SplitName
from pretrain.checkpoint.layout import read_run_recipe, read_state
from pretrain.checkpoint.state import CheckpointState
from pretrain.checkpoint.weights import load_model
from pretrain.checkpoint.weights_only import is_weights_alone
from pretrain.config.loader_plan import loader_plan
from pretrain.config.recipe import Recipe
from pretrain.core.errors import ConfigError, DataError
from pretrain.evaluation.call_dependence import call_dependence
from pretrain.evaluation.checkpoint import load_corpora_of, load_matching_corpora
from pretrain.evaluation.generation.generators import open_transformers
from pretrain.evaluation.heldout.ngram import NGram, fit_ngram, ngram_nll, sample_pairs
from pretrain.evaluation.heldout.other_tokens import in_tokens_of
from pretrain.evaluation.heldout.perplexity import (
    BatchLogits,
    Evaluation,
    checked,
    native_logits,
    score_batches,
    transformers_logits,
)
from pretrain.evaluation.heldout.scores import (
    BaselineScore,
    GroupScore,
    HeldoutScore,
    ModelScore,
)
from pretrain.evaluation.heldout.text import Groups, HeldoutText, SlidingWindows, read_split
from pretrain.export.hf_files import is_hf_folder, read_config, stored_shapes

NGRAM_NAMES = re.compile(r"^(unigram|bigram|trigram|([1-9])-gram)$")
NAMED_ORDERS = {"unigram": 1, "bigram": 2, "trigram": 3}


@dataclass(frozen=True)
class WindowPlan:
    """How a text is cut into windows.

    Attributes:
        window, stride: inputs of a window, and the distance from one to the next, in tokens.
        batch_size: windows at once. If experts drop tokens, the loss depends on it.
        max_windows: score only this many, spread over the split; all by default.
    """

    window: int
    stride: int
    batch_size: int
    pad_id: int
    document_mask: bool
    max_windows: int | None = None

    def windows(self, text: HeldoutText) -> SlidingWindows:
        """The windows of a text."""
        return SlidingWindows(
            text.stream, self.window, self.stride, self.pad_id, self.document_mask, text.section
        )

    def is_complete(self, windows: SlidingWindows) -> bool:
        """Whether every token of the split is scored, as bits per byte need."""
        return not windows.is_sample and (
            self.max_windows is None or self.max_windows >= windows.num_all
        )

    def batches(self, windows: SlidingWindows, title: str) -> Iterator[Batch]:
        """Batches of the windows, the same ones in each call, with a progress bar."""
        count = min(windows.num_all, self.max_windows or windows.num_all)
        batches = validation_batches(windows, self.batch_size, 0, 1, self.max_windows)
        yield from tqdm(batches, total=-(-count // self.batch_size), desc=title, unit="batch")

    def places(self, windows: SlidingWindows) -> Iterator[np.ndarray]:
        """For each batch, the position of each target in the stream.

        Yields int64 [b, S]; b is smaller than the batch size in the last batch, whose padding has
        no positions.
        """
        count = min(windows.num_all, self.max_windows or windows.num_all)
        # The same windows as validation_batches chooses; labels are one token behind the inputs.
        starts = np.arange(count) * windows.num_all // count * windows.step
        for first in range(0, count, self.batch_size):
            yield starts[first : first + self.batch_size, None] + np.arange(1, self.window + 1)


def score_checkpoint(
    checkpoint: Path,
    data: str | Path | None,
    split: SplitName,
    device: torch.device,
    *,
    batch_size: int | None = None,
    max_windows: int | None = None,
    baselines: Sequence[str] = ("bigram",),
    window: int | None = None,
    stride: int | None = None,
) -> HeldoutScore:
    """Scores a checkpoint on every window of a split, or on ``max_windows`` of them.

    Args:
        data: a data folder; the run's own by default.
        batch_size: windows at once, the recipe's micro batch by default.
        baselines: Hugging Face folders, or unigram, bigram, 3-gram and so on; for these ``data``
            must be what the checkpoint was trained on.
        window, stride: in tokens; by default the training's sequence length, without overlap.

    Raises:
        DataError: if ``data`` does not belong to the checkpoint, or the split is too short.
        CheckpointError: if the checkpoint is incomplete or damaged.
        ConfigError: for a baseline that is neither, or windows that the model cannot read.
    """
    check_baselines(baselines)
    datasets = load_matching_corpora(data, checkpoint)
    state = read_state(checkpoint)
    model, recipe = load_model(checkpoint, device=device)
    longest = model.config.max_position_embeddings
    length = recipe.train.sequence_length
    plan = _plan(
        window or length,
        stride,
        longest=longest,
        batch_size=batch_size or recipe.train.micro_batch_size,
        pad_id=datasets.pad_id,
        recipe=recipe,
        max_windows=max_windows,
    )
    text = read_split(datasets, split)

    def fit(order: int) -> tuple[NGram, int]:
        return fit_on_seen_samples(datasets, read_run_recipe(checkpoint), state, order)

    # Fitted first, so that data that the model was not trained on is found before the long part.
    fitted = {name: fit(ngram_order(name)) for name in baselines if NGRAM_NAMES.match(name)}
    score = _score(native_logits(model), text, plan, device, f"{split} windows")
    scores = {name: _score_baseline(name, fitted, text, plan, device) for name in baselines}
    return _heldout_score(
        score,
        scores,
        plan,
        data=datasets.place,
        step=state["step"],
        split=split,
        depends_on_batch=call_dependence(model.config),
    )


def score_transformers(
    folder: Path,
    data: str | Path,
    split: SplitName,
    device: torch.device,
    *,
    batch_size: int = 1,
    max_windows: int | None = None,
    baselines: Sequence[str] = (),
    window: int | None = None,
    stride: int | None = None,
) -> HeldoutScore:
    """Scores a Hugging Face folder on the texts of ``data``, in the tokens of its own tokenizer.

    If that is not the tokenizer of the data, only the windows that are scored are encoded: see
    :func:`pretrain.evaluation.heldout.other_tokens.in_tokens_of`.

    Raises:
        ConfigError: for an n-gram baseline: the training data of such a folder is not known.
        DataError, CheckpointError: as :func:`score_checkpoint`.
    """
    check_baselines(baselines)
    if ngrams := [name for name in baselines if NGRAM_NAMES.match(name)]:
        raise ConfigError(
            f"the baseline {ngrams[0]} is fitted on what a checkpoint has seen, and {folder} is"
            " none: leave it out"
        )
    datasets = load_corpora_of(data)
    text = read_split(datasets, split)
    opened = open_transformers(folder, device)
    # Foreign models have contexts of 100,000 tokens and more, in which few windows fit.
    window = window or min(1024, opened.max_positions)
    plan = _plan(
        window,
        stride,
        longest=opened.max_positions,
        batch_size=batch_size,
        pad_id=opened.eod_id,
        recipe=None,
        max_windows=max_windows,
    )
    encoded = in_tokens_of(opened, text, window, max_windows)
    score = _score(transformers_logits(opened.model), encoded, plan, device, f"{split} windows")
    scores = {name: _score_baseline(name, {}, text, plan, device) for name in baselines}
    return _heldout_score(
        score,
        scores,
        plan,
        data=datasets.place,
        step=None,
        split=split,
        depends_on_batch=opened.call_dependence,
    )


def _heldout_score(
    score: ModelScore,
    baselines: dict[str, BaselineScore],
    plan: WindowPlan,
    *,
    data: str,
    step: int | None,
    split: str,
    depends_on_batch: str | None,
) -> HeldoutScore:
    return HeldoutScore(
        data=data,
        step=step,
        split=split,
        window=plan.window,
        stride=plan.stride,
        batch_size=plan.batch_size,
        depends_on_batch=depends_on_batch,
        targets=score.total.targets,
        loss=score.total.loss,
        perplexity=score.total.perplexity,
        accuracy=score.total.accuracy,
        bits_per_byte=score.total.bits_per_byte,
        by_source=score.by_source,
        by_length=score.by_length,
        baselines=baselines,
    )


def _plan(
    window: int,
    stride: int | None,
    *,
    longest: int,
    batch_size: int,
    pad_id: int,
    recipe: Recipe | None,
    max_windows: int | None,
) -> WindowPlan:
    if not 1 <= window <= longest:
        raise ConfigError(
            f"--window is {window} tokens, the model has {longest} positions: give a window from 1"
            " to that"
        )
    return WindowPlan(
        window,
        stride or window,
        batch_size,
        pad_id,
        recipe is not None and recipe.data.document_mask,
        max_windows,
    )


def _score(
    logits_of: BatchLogits, text: HeldoutText, plan: WindowPlan, device: torch.device, title: str
) -> ModelScore:
    """The model's scores over all windows, in total and by group."""
    windows = plan.windows(text)
    groups = Groups(text)
    # The scores come without the batch that they are of: its labels say which targets count.
    seen: list[Batch] = []

    def remembered() -> Iterator[Batch]:
        for batch in plan.batches(windows, title):
            seen[:] = [batch]
            yield batch

    for (nats_BS, correct_BS), places_bS in zip(
        score_batches(logits_of, remembered(), device), plan.places(windows), strict=True
    ):
        # The last batch is filled up with empty windows, which have no places.
        rows = len(places_bS)
        scored_bS = seen[0].labels_BS[:rows].numpy() != NO_LOSS
        groups.add(
            places_bS[scored_bS],
            nats_BS[:rows].cpu().numpy()[scored_bS],
            correct_BS[:rows].cpu().numpy()[scored_bS],
        )
    nats, targets, correct = groups.totals()
    checked(Evaluation(nats, targets, correct))
    complete = plan.is_complete(windows)
    # Decoding all documents takes long, and is needed for bits per byte only.
    bytes_D = text.bytes_D() if complete else None
    total = GroupScore.of(nats, targets, correct, text.utf8_bytes if complete else None)
    by_source, by_length = (
        {name: GroupScore.of(*sums) for name, sums in groups.by(kind, bytes_D).items()}
        for kind in ("source", "length")
    )
    return ModelScore(total, by_source, by_length)


def check_baselines(names: Sequence[str]) -> None:
    """Checks the names of baselines, before the model is scored.

    Raises:
        ConfigError: for a name that is neither an n-gram nor a Hugging Face folder.
        CheckpointError: for a folder with foreign code, or files of weights that are missing or
            damaged.
    """
    for name in names:
        if NGRAM_NAMES.match(name):
            continue
        if is_hf_folder(Path(name)):
            read_config(Path(name))
            stored_shapes(Path(name))
        else:
            raise ConfigError(
                f"the baseline {name} is no n-gram (unigram, bigram, 3-gram to 9-gram) and no"
                " Hugging Face folder: correct it"
            )


def ngram_order(name: str) -> int:
    """The order of an n-gram by its name: 2 for ``bigram``, 5 for ``5-gram``."""
    return NAMED_ORDERS[name] if name in NAMED_ORDERS else int(name[0])


def _score_baseline(
    name: str,
    fitted: dict[str, tuple[NGram, int]],
    text: HeldoutText,
    plan: WindowPlan,
    device: torch.device,
) -> BaselineScore:
    if name in fitted:
        ngram, samples = fitted[name]
        windows = plan.windows(text)
        evaluation = Evaluation(*ngram_nll(ngram, plan.batches(windows, name)))
        bits = evaluation.bits_per_byte(text.utf8_bytes) if plan.is_complete(windows) else None
        return BaselineScore(
            evaluation.loss, evaluation.perplexity, bits, evaluation.targets, samples
        )
    opened = open_transformers(Path(name), device)
    window = min(plan.window, opened.max_positions)
    encoded = in_tokens_of(opened, text, window, plan.max_windows)
    baseline_plan = WindowPlan(
        window,
        min(plan.stride, window),
        plan.batch_size,
        opened.eod_id,
        plan.document_mask,
        plan.max_windows,
    )
    logits_of = transformers_logits(opened.model)
    total = _score(logits_of, encoded, baseline_plan, device, Path(name).name).total
    return BaselineScore(total.loss, total.perplexity, total.bits_per_byte, total.targets)


def fit_on_seen_samples(
    datasets: Datasets, recipe: Recipe, state: CheckpointState, order: int = 2
) -> tuple[NGram, int]:
    """An n-gram fitted on the training samples that a checkpoint has seen, and their number.

    A sample that was seen in several epochs counts once.

    Args:
        recipe: of the whole run.
        state: of the checkpoint.

    Raises:
        CheckpointError: if its position in the data is none.
        DataError: if ``datasets`` is not the data that the run has seen.
    """
    if is_weights_alone(state):
        raise DataError(
            "the n-gram is fitted on what the model has seen, which a checkpoint of weights alone"
            " does not record: leave the n-gram out"
        )
    is_megatrons = recipe.data.order.is_megatrons
    if not is_megatrons and "plans" not in state["data"]:
        raise DataError(
            "the n-gram is fitted on what the model has seen, which a run with data.streaming does"
            " not keep: pass --no-bigram"
        )
    seen: dict[str, np.ndarray] = {}
    loader: MegatronLoader | ShardLoader
    if not is_megatrons:
        saved = read_saved(SavedPosition, state["data"])
        seen = seen_samples(saved.plans, saved.samples, recipe.seed)
    try:
        if is_megatrons:
            loader = open_megatron_loader(recipe.data, datasets, loader_plan(recipe), 0, 1)
            loader.resume(state["data"], state["step"])
            seen = loader.seen_samples(state["step"])
        else:
            loader = open_shard_loader(recipe.data, datasets, loader_plan(recipe), 0, 1)
            loader.resume(state["data"], state["step"])
        samples = {
            name: loader.sources[name].samples for name, numbers in seen.items() if len(numbers)
        }
    except (ConfigError, DataError, KeyError):
        raise DataError(
            "the n-gram is fitted on what the model has seen, but it was trained on other shards"
            f" than those in {datasets.place}: give the run's own with --data, or pass --no-bigram"
        ) from None
    chunks = chain.from_iterable(sample_pairs(samples[name], seen[name], order) for name in samples)
    return fit_ngram(chunks, datasets.tokenizer.vocab_size, order), sum(map(len, seen.values()))
