"""Retrieval by context length and by depth (Kamradt 2023; RULER, Hsieh et al. 2024)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from data_pipeline.shards.datasets import Datasets
from data_pipeline.shards.split import SplitName
from data_pipeline.tokenizer.files import tokenizer_file
from data_pipeline.tokenizer.tokenizer import load_tokenizer
from pretrain.checkpoint.layout import read_recipe
from pretrain.checkpoint.weights import load_model
from pretrain.core.errors import ConfigError
from pretrain.evaluation.checkpoint import load_corpora_of, load_matching_corpora
from pretrain.evaluation.generation.generate import right_aligned
from pretrain.evaluation.generation.generators import (
    NativeGenerator,
    TextGenerator,
    TransformersGenerator,
    open_transformers,
)
from pretrain.evaluation.heldout.lengths import AS_TRAINED, recipe_with_position, variant_name
from pretrain.evaluation.heldout.other_tokens import in_tokens_of
from pretrain.evaluation.heldout.perplexity import Evaluation, checked
from pretrain.evaluation.heldout.text import HeldoutText, read_split
from pretrain.evaluation.needle.contexts import Context, Haystack, make_haystack
from pretrain.evaluation.needle.forms import needle_form
from pretrain.evaluation.result import NeedleResult, NeedleScore

# Of a batch of contexts, unless a batch size is given.
TOKENS_AT_ONCE = 8192
# By default the longest context is all positions of the model, and each shorter one is half of it.
HALVINGS = 4

Scores = dict[str, dict[str, NeedleScore]]


@dataclass(frozen=True)
class NeedleOptions:
    """What is measured.

    Attributes:
        lengths: tokens of a context, question and value included; by default the model's positions
            and three halves of halves.
        depths: shares of the filler before the needle.
        samples: contexts of each length and depth.
        form: see :data:`pretrain.evaluation.needle.forms.FORMS`.
        positions: as :class:`pretrain.evaluation.heldout.lengths.LengthOptions` has it.
    """

    lengths: Sequence[int] = ()
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0)
    samples: int = 20
    form: str = "magic-number"
    positions: Sequence[str] = (AS_TRAINED,)
    data: str | None = None
    split: SplitName = "validation"
    seed: int = 0

    def __post_init__(self) -> None:
        needle_form(self.form)
        if self.lengths and min(self.lengths) < 1:
            raise ConfigError(f"--needle has {min(self.lengths)}: give 1 token or more")
        if wrong := [depth for depth in self.depths if not 0 <= depth <= 1]:
            raise ConfigError(
                f"--depths has {wrong[0]}: give shares of the context from 0 (its beginning) to 1"
                " (right before the question)"
            )

    def sorted_lengths(self, positions: int) -> list[int]:
        """The lengths from the shortest on, for a model of so many positions."""
        default = [positions >> halving for halving in range(HALVINGS)]
        return sorted(set(self.lengths or default))


def score_contexts(
    opened: TextGenerator, contexts: Sequence[Context], batch_size: int
) -> Iterator[tuple[bool, float]]:
    """Scores the value of each context, with the model's cache.

    Every value token is read after the right ones before it. If each is the likeliest token there,
    a greedy text would be exactly the value, and else it would not: one pass scores both.

    Yields whether greedy decoding finds the whole value, and -log p of it in nats.
    """
    for first in range(0, len(contexts), batch_size):
        batch = contexts[first : first + batch_size]
        added_BS, padding = right_aligned([context.prompt for context in batch])
        steps = max(len(context.value) for context in batch)
        next_logits = opened.start(added_BS.shape[1] + steps, padding)
        exact, nats = [True] * len(batch), [0.0] * len(batch)
        for step in range(steps):
            log_probs_BV = next_logits(added_BS).float().log_softmax(dim=-1).cpu()
            likeliest = log_probs_BV.argmax(dim=-1).tolist()
            # What follows a shorter value is not scored; any token may be there.
            wanted = [context.value[step : step + 1] for context in batch]
            for row, token in enumerate(wanted):
                if token:
                    exact[row] &= likeliest[row] == token[0]
                    nats[row] -= float(log_probs_BV[row, token[0]])
            added_BS = torch.tensor([token or [0] for token in wanted])
        yield from zip(exact, nats, strict=True)


def score_haystack(
    opened: TextGenerator,
    haystack: Haystack,
    lengths: Sequence[int],
    depths: Sequence[float],
    batch_size: int | None,
    title: str,
) -> Scores:
    """The scores by length and by depth.

    Args:
        batch_size: contexts at once; by default as many as have 8,192 tokens.

    Raises:
        NonFiniteError: if the model's logits are not numbers.
    """
    found: Scores = {}
    cells = len(lengths) * len(depths)
    with tqdm(total=cells * len(haystack.needles), desc=title, unit="context") as bar:
        for length in lengths:
            at_once = batch_size or max(1, TOKENS_AT_ONCE // length)
            found[str(length)] = {}
            for depth in depths:
                contexts = haystack.contexts(length, depth)
                scores = []
                for score in score_contexts(opened, contexts, at_once):
                    scores.append(score)
                    bar.update()
                tokens = sum(len(context.value) for context in contexts)
                found[str(length)][f"{depth:g}"] = _cell(scores, tokens)
    return found


def _cell(scores: Sequence[tuple[bool, float]], tokens: int) -> NeedleScore:
    correct = sum(exact for exact, _ in scores)
    total = checked(Evaluation(sum(nats for _, nats in scores), tokens))
    return {"contexts": len(scores), "accuracy": correct / len(scores), "loss": total.loss}


def score_checkpoint_needles(
    checkpoint: Path, options: NeedleOptions, device: torch.device, batch_size: int | None = None
) -> NeedleResult:
    """Scores a checkpoint with each position encoding.

    A rotary embedding or ALiBi may be asked for more tokens than the recipe has positions.

    Raises:
        ConfigError: for positions that the model does not have, or another family of encodings.
        DataError: if the data does not belong to the checkpoint, or the split is too short.
    """
    trained = read_recipe(checkpoint)
    lengths = options.sorted_lengths(trained.model.max_position_embeddings)
    recipes = {
        variant_name(wanted, trained, options.positions): recipe_with_position(
            trained, wanted, lengths[-1], "--needle"
        )
        for wanted in options.positions
    }
    datasets = load_matching_corpora(options.data, checkpoint)
    tokenizer = load_tokenizer(tokenizer_file(checkpoint), trained.data.tokenizer)
    haystack: Haystack | None = None
    dependence: str | None = None
    variants: dict[str, Scores] = {}
    for name, recipe in recipes.items():
        model, _ = load_model(checkpoint, device=device, recipe=recipe)
        opened = NativeGenerator(model, tokenizer, device)
        dependence = opened.call_dependence
        if haystack is None:
            around = {tokenizer.eod_id, tokenizer.bos_id}
            text = read_split(datasets, options.split)
            haystack = _haystack(opened, text, around, options, lengths[-1])
        variants[name] = score_haystack(
            opened, haystack, lengths, options.depths, batch_size, f"needles, {name}"
        )
    assert haystack is not None
    length = trained.train.sequence_length
    return _result(
        trained.model.position.kind, length, datasets, options, haystack, variants, dependence
    )


def score_transformers_needles(
    folder: Path, options: NeedleOptions, device: torch.device, batch_size: int | None
) -> NeedleResult:
    """Scores a Hugging Face folder, up to the positions that it states.

    Raises:
        ConfigError: for another position encoding, which its own config says, and longer contexts.
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
    datasets = load_corpora_of(options.data)
    opened = open_transformers(folder, device)
    lengths = options.sorted_lengths(opened.max_positions)
    if lengths[-1] > opened.max_positions:
        raise ConfigError(
            f"--needle has {lengths[-1]} tokens, and {folder} has {opened.max_positions} positions"
            " (max_position_embeddings in its config.json): give shorter contexts"
        )
    text = in_tokens_of(
        opened, read_split(datasets, options.split), 4 * lengths[-1], options.samples
    )
    around = {opened.eod_id, *opened.bos_ids}
    haystack = _haystack(opened, text, around, options, lengths[-1])
    scores = score_haystack(
        opened, haystack, lengths, options.depths, batch_size, f"needles, {folder.name}"
    )
    return _result(
        folder.name,
        None,
        datasets,
        options,
        haystack,
        {folder.name: scores},
        opened.call_dependence,
    )


def _haystack(
    opened: NativeGenerator | TransformersGenerator,
    text: HeldoutText,
    around: set[int | None],
    options: NeedleOptions,
    longest: int,
) -> Haystack:
    ids = frozenset(token for token in around if token is not None)
    return make_haystack(
        opened,
        needle_form(options.form),
        text.stream,
        ids,
        longest,
        options.samples,
        options.seed,
    )


def _result(
    trained_position: str,
    trained_length: int | None,
    datasets: Datasets,
    options: NeedleOptions,
    haystack: Haystack,
    variants: dict[str, Scores],
    dependence: str | None,
) -> NeedleResult:
    return {
        "data": datasets.place,
        "split": options.split,
        "form": options.form,
        "trained_position": trained_position,
        "trained_length": trained_length,
        "samples": options.samples,
        "value_tokens": sum(len(needle.value) for needle in haystack.needles)
        / len(haystack.needles),
        "depends_on_batch": dependence,
        "variants": variants,
    }
