"""The loss at several context lengths, also beyond those of the training (Press et al. 2022).

Every length reads the same sections of held-out text, cut into windows of its own size, so that a
longer context only adds what is to be seen before a target.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data_pipeline.loading.batch import NO_LOSS, Batch, to_batch
from data_pipeline.loading.packing import Windows
from data_pipeline.shards.datasets import Datasets
from data_pipeline.shards.split import SplitName
from pretrain.checkpoint.layout import read_recipe
from pretrain.checkpoint.weights import load_model
from pretrain.config.load import parse_yaml, validate_recipe
from pretrain.config.recipe import Recipe
from pretrain.core.errors import ConfigError, DataError
from pretrain.core.files import JsonObject
from pretrain.evaluation.checkpoint import load_corpora_of, load_matching_corpora
from pretrain.evaluation.generation.generators import open_transformers
from pretrain.evaluation.heldout.other_tokens import in_tokens_of
from pretrain.evaluation.heldout.perplexity import (
    BatchLogits,
    Evaluation,
    checked,
    native_logits,
    score_batches,
    transformers_logits,
)
from pretrain.evaluation.heldout.text import HeldoutText, SlidingWindows, read_split
from pretrain.evaluation.result import LengthScore, LengthsResult
from pretrain.model.positions.config import Position

# Positions up to here are one group; each further group is twice as long as all before it.
FIRST_POSITIONS = 32
AS_TRAINED = "trained"


@dataclass(frozen=True)
class LengthOptions:
    """What is measured.

    Attributes:
        lengths: tokens of a window.
        positions: for each variant, a kind of position encoding or a YAML mapping as in a recipe's
            ``model.position``; ``trained`` is that of the training.
        max_windows: sections of the longest length, spread over the split; all by default.
    """

    lengths: Sequence[int]
    positions: Sequence[str] = (AS_TRAINED,)
    data: str | None = None
    split: SplitName = "validation"
    max_windows: int | None = None


@dataclass(frozen=True)
class Sections:
    """Parts of a held-out text that every length reads whole.

    Attributes:
        starts: the first token of each.
        tokens: inputs of each, which is the longest length.
    """

    text: HeldoutText
    starts: np.ndarray
    tokens: int
    pad_id: int
    document_mask: bool

    @classmethod
    def of(
        cls,
        text: HeldoutText,
        tokens: int,
        max_windows: int | None,
        pad_id: int,
        document_mask: bool,
    ) -> Sections:
        """Whole sections, spread over the split.

        Raises:
            DataError: if the split is shorter than one.
        """
        windows = SlidingWindows(
            text.stream, tokens, tokens, pad_id, document_mask, section=text.section
        )
        starts = np.arange(windows.num_all) * windows.step
        # Only whole ones: a shorter last one would hold other targets at each length.
        starts = starts[starts + tokens < text.stream.num_tokens]
        if not len(starts):
            raise DataError(
                f"the split has {text.stream.num_tokens} tokens, and one window of {tokens} needs"
                f" {tokens + 1}: give shorter --lengths or more --data"
            )
        count = min(len(starts), max_windows or len(starts))
        return cls(
            text, starts[np.arange(count) * len(starts) // count], tokens, pad_id, document_mask
        )


def score_lengths(
    logits_of: BatchLogits,
    sections: Sections,
    lengths: Sequence[int],
    tokens_at_once: int,
    device: torch.device,
    title: str,
) -> dict[str, LengthScore]:
    """The scores by length, each over all windows that fit into the sections.

    Args:
        tokens_at_once: of a batch of windows; at least one window is in it.
    """
    return {
        str(length): _score(
            logits_of,
            sections,
            length,
            max(1, tokens_at_once // length),
            device,
            f"{title}, {length} tokens",
        )
        for length in lengths
    }


def _score(
    logits_of: BatchLogits,
    sections: Sections,
    length: int,
    batch_size: int,
    device: torch.device,
    title: str,
) -> LengthScore:
    windows = Windows(
        sections.text.stream, length, sections.pad_id, document_mask=sections.document_mask
    )
    in_section = sections.tokens // length
    starts = (sections.starts[:, None] + np.arange(in_section) * length).ravel()
    section_of = np.repeat(np.arange(len(sections.starts)), in_section)
    # By position in the window or, with a document mask, in the document.
    nats_S, targets_S = np.zeros(length), np.zeros(length, np.int64)
    nats_by_section, targets_by_section = (
        np.zeros(len(sections.starts)),
        np.zeros(len(sections.starts), np.int64),
    )
    correct = 0
    seen: list[Batch] = []

    def batches() -> Iterator[Batch]:
        for first in tqdm(range(0, len(starts), batch_size), desc=title, unit="batch"):
            rows = [windows.read_at(int(start)) for start in starts[first : first + batch_size]]
            seen[:] = [to_batch(rows)]
            yield seen[0]

    done = 0
    for nats_BS, correct_BS in score_batches(logits_of, batches(), device):
        scored_BS = (seen[0].labels_BS != NO_LOSS).numpy()
        nats_T = nats_BS.cpu().numpy()[scored_BS]
        positions_BS = seen[0].position_ids_BS
        positions_T = (
            np.nonzero(scored_BS)[1] if positions_BS is None else positions_BS.numpy()[scored_BS]
        )
        sections_T = section_of[done + np.nonzero(scored_BS)[0]]
        np.add.at(nats_S, positions_T, nats_T)
        np.add.at(targets_S, positions_T, 1)
        np.add.at(nats_by_section, sections_T, nats_T)
        np.add.at(targets_by_section, sections_T, 1)
        correct += int(correct_BS.cpu().numpy()[scored_BS].sum())
        done += len(scored_BS)
    total = checked(Evaluation(float(nats_S.sum()), int(targets_S.sum()), correct))
    return {
        "targets": total.targets,
        "loss": total.loss,
        "standard_error": _standard_error(nats_by_section, targets_by_section),
        "perplexity": total.perplexity,
        "accuracy": total.accuracy,
        "by_position": _by_position(nats_S, targets_S),
    }


def _standard_error(nats: np.ndarray, targets: np.ndarray) -> float | None:
    """Of the loss, with sections as the units that were drawn; None for a single one.

    Tokens of one text are not independent, so that counting them would make it far too small.
    """
    losses = nats[targets > 0] / targets[targets > 0]
    return float(losses.std(ddof=1) / math.sqrt(len(losses))) if len(losses) > 1 else None


def _by_position(nats_S: np.ndarray, targets_S: np.ndarray) -> dict[str, JsonObject]:
    found: dict[str, JsonObject] = {}
    first, end = 0, FIRST_POSITIONS
    while first < len(nats_S):
        last = min(end, len(nats_S))
        targets = int(targets_S[first:last].sum())
        if targets:
            loss = float(nats_S[first:last].sum()) / targets
            found[f"{first} to {last - 1}"] = {"targets": targets, "loss": loss}
        first, end = last, 2 * end
    return found


def score_checkpoint_lengths(
    checkpoint: Path, options: LengthOptions, device: torch.device, batch_size: int | None = None
) -> LengthsResult:
    """Scores a checkpoint at each length with each position encoding.

    Args:
        batch_size: windows of the training's length at once, the recipe's micro batch by default;
            longer ones are fewer.

    Raises:
        ConfigError: for positions that the model does not have, or another family of encodings.
        DataError: if the data does not belong to the checkpoint, or the split is too short.
    """
    trained = read_recipe(checkpoint)
    lengths = _sorted(options.lengths)
    recipes = {
        variant_name(wanted, trained, options.positions): recipe_with_position(
            trained, wanted, lengths[-1]
        )
        for wanted in options.positions
    }
    datasets = load_matching_corpora(options.data, checkpoint)
    length = trained.train.sequence_length
    sections = Sections.of(
        read_split(datasets, options.split),
        lengths[-1],
        options.max_windows,
        datasets.pad_id,
        trained.data.document_mask,
    )
    at_once = (batch_size or trained.train.micro_batch_size) * length
    variants: dict[str, dict[str, LengthScore]] = {}
    for name, recipe in recipes.items():
        model, _ = load_model(checkpoint, device=device, recipe=recipe)
        logits_of = native_logits(model)
        variants[name] = score_lengths(logits_of, sections, lengths, at_once, device, name)
    return _result(trained.model.position.kind, length, datasets, options, sections, variants)


def score_transformers_lengths(
    folder: Path, options: LengthOptions, device: torch.device, batch_size: int
) -> LengthsResult:
    """Scores a Hugging Face folder at each length, up to the positions that it states.

    Raises:
        ConfigError: for another position encoding, which its own config says, and longer lengths.
    """
    if options.data is None:
        raise ConfigError(
            f"{folder} does not say what it was trained on: give held-out text with --data FOLDER"
        )
    if tuple(options.positions) != (AS_TRAINED,):
        raise ConfigError(
            f"--positions changes the recipe of a checkpoint, and {folder} is a Hugging Face"
            " folder: set rope_scaling in its config.json instead"
        )
    lengths = _sorted(options.lengths)
    datasets = load_corpora_of(options.data)
    opened = open_transformers(folder, device)
    if lengths[-1] > opened.max_positions:
        raise ConfigError(
            f"--lengths has {lengths[-1]} tokens, and {folder} has {opened.max_positions} positions"
            " (max_position_embeddings in its config.json): give shorter ones"
        )
    text = in_tokens_of(
        opened, read_split(datasets, options.split), lengths[-1], options.max_windows
    )
    sections = Sections.of(text, lengths[-1], options.max_windows, opened.eod_id, False)
    at_once = batch_size * lengths[0]
    logits_of = transformers_logits(opened.model)
    scores = score_lengths(logits_of, sections, lengths, at_once, device, folder.name)
    variants = {folder.name: scores}
    return _result(folder.name, None, datasets, options, sections, variants)


def _result(
    trained_position: str,
    trained_length: int | None,
    datasets: Datasets,
    options: LengthOptions,
    sections: Sections,
    variants: dict[str, dict[str, LengthScore]],
) -> LengthsResult:
    return {
        "data": datasets.place,
        "split": options.split,
        "trained_position": trained_position,
        "trained_length": trained_length,
        "sections": len(sections.starts),
        "section_tokens": sections.tokens,
        "document_mask": sections.document_mask,
        "variants": variants,
    }


def _sorted(lengths: Sequence[int]) -> list[int]:
    if min(lengths) < 1:
        raise ConfigError(f"--lengths has {min(lengths)}: give 1 token or more")
    return sorted(set(lengths))


def variant_name(wanted: str, trained: Recipe, positions: Sequence[str]) -> str:
    """What a variant of ``--positions`` is called in results; the training's is its kind."""
    if wanted != AS_TRAINED:
        return wanted
    kind = trained.model.position.kind
    # The same kind asked for by name has other settings.
    return f"{kind} ({AS_TRAINED})" if kind in positions else kind


def recipe_with_position(
    trained: Recipe, wanted: str, longest: int, option: str = "--lengths"
) -> Recipe:
    """The recipe with another position encoding, and with ``longest`` positions.

    A ``factor`` and an ``original_max_position_embeddings`` that ``wanted`` leaves out are those
    that stretch the training's length to ``longest``; the base of a rotary embedding stays.

    Args:
        option: what asks for ``longest``, for errors.

    Raises:
        ConfigError: if the model cannot read as many tokens, or the weights mean nothing under the
            encoding.
    """
    before = trained.model.position
    content = trained.model_dump(mode="json")
    # Of the phase that the checkpoint is in: the sections say all of it.
    content["phases"] = []
    if wanted != AS_TRAINED:
        length = trained.train.sequence_length
        content["model"]["position"] = _completed(wanted, before, longest, length)
    positions = trained.model.max_position_embeddings
    content["model"]["max_position_embeddings"] = max(longest, positions)
    recipe = validate_recipe(content, "--positions")
    now = recipe.model.position
    if not now.keeps_the_meaning_of(before):
        raise ConfigError(
            f"--positions {now.kind}: the weights were trained with {before.kind}, and mean nothing"
            " with another family of encodings: give one that rotates or biases alike"
        )
    if now.bounded and longest > positions:
        raise ConfigError(
            f"{option} has {longest} tokens, and the model has a learned vector for each of its"
            f" {positions} positions, none for later ones: give lengths up to that"
        )
    return recipe


def _completed(wanted: str, before: Position, longest: int, trained_length: int) -> JsonObject:
    """A mapping for ``model.position`` from what the user gave."""
    given = parse_yaml(wanted, "--positions")
    mapping = {"kind": given} if isinstance(given, str) else given
    if not isinstance(mapping, dict):
        raise ConfigError(
            f'--positions {wanted}: give a kind, or a mapping such as "{{kind: yarn, factor: 4}}"'
        )
    if mapping.get("kind") in ("yarn", "llama3"):
        stretch = max(1.0, longest / trained_length)
        mapping = {
            "factor": stretch,
            "original_max_position_embeddings": trained_length,
            **mapping,
        }
    theta = getattr(before, "rope_theta", None)
    # A kind without a base refuses it, in the schema's own sentence.
    if theta is not None and mapping.get("kind") in ("rope", "yarn", "llama3", "rope_alibi"):
        mapping = {"rope_theta": theta, **mapping}
    return mapping
