"""The coordinate check of muP: do activations keep their size when a model becomes wider?

Yang et al. 2022, "Tensor Programs V", appendix D.1. A model of each width takes a few optimizer
steps in this process, without DeepSpeed's engine. Before the first step and after each one, every
kind of layer is measured on the same text. If an activation grows or shrinks with the width, a
learning rate that suits a narrow model does not suit a wide one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypedDict

import torch
from torch import nn

from data_pipeline.loading.batch import Batch
from data_pipeline.loading.shard_loader import open_shard_loader
from data_pipeline.shards.datasets import data_folders, load_datasets
from data_pipeline.shards.manifest import manifest_path
from pretrain.config.loader_plan import loader_plan
from pretrain.config.recipe import Recipe
from pretrain.model.decoder import DecoderLM
from pretrain.model.init import initialize
from pretrain.model.init_config import BaseWidths, MaximalUpdate, StandardInitialization
from pretrain.model.moe.experts import Experts
from pretrain.model.moe.router import TopKRouter
from pretrain.model.widths import Growing, scaled_widths, with_widths
from pretrain.optim.param_groups import (
    build_optimizer,
    learning_rate_scale,
    parameter_groups,
    peak_learning_rates,
)

Kind = Literal["standard", "mup"]
Batches = Callable[[int], list[Batch]]
"""The micro batches of a step, from 0."""

KINDS: tuple[Kind, ...] = ("standard", "mup")
RANDOM_VOCABULARY = 1024
# A power of the width above which a size does not count as stable: over three doublings of the
# width it is a factor of 1.7.
TOLERANCE = 0.25
# At first these are sums over random terms, one a dimension, and muP wants them to be smaller
# in a wide model until it has learned something.
OUTPUTS = ("attention scores", "router logits", "logits")
SMALLER_START = -0.6


def recipe_at(
    recipe: Recipe, hidden_size: int, base_size: int, kind: Kind, growing: Growing
) -> Recipe:
    """The recipe with a model of another width and the same proportions, scaled from a base width.

    Raises:
        ConfigError: if a width would not be a whole number.
    """
    model = with_widths(recipe.model, scaled_widths(recipe.model, hidden_size, growing))
    base = BaseWidths(**scaled_widths(recipe.model, base_size, growing))
    initialization = (
        MaximalUpdate(kind="mup", base=base) if kind == "mup" else StandardInitialization()
    )
    return recipe.model_copy(
        update={"model": model.model_copy(update={"initialization": initialization})}
    )


class PlainTraining:
    """Trains a model as the engine would in one process in fp32, with the same losses and groups.

    Args:
        recipe: with ``model.vocab_size`` set, and no data that leave out labels.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.model = DecoderLM(recipe.model.portable())
        initialize(self.model, recipe.seed)
        self.peaks = peak_learning_rates(recipe.optimizer)
        self.optimizer = build_optimizer(
            parameter_groups(self.model, recipe.model, recipe.optimizer), recipe.optimizer
        )
        # Dropout and router noise draw from the global stream.
        torch.manual_seed(recipe.seed)

    def step(self, micro_batches: Sequence[Batch], factor: float = 1.0) -> float:
        """Takes one optimizer step at ``factor`` times the peak learning rates.

        Returns the cross-entropy before the step, in nats a token.
        """
        for group in self.optimizer.param_groups:
            # Set in each step: there is no schedule, and muP scales each group by its width.
            group["lr"] = self.peaks[group["role"]] * learning_rate_scale(group) * factor
        self.model.train()
        self.optimizer.zero_grad()
        total = 0.0
        for batch in micro_batches:
            tokens = float(batch.input_ids_BS.numel())
            output = self.model(
                batch.input_ids_BS,
                batch.labels_BS,
                tokens,
                batch.document_ids_BS,
                None,
                batch.position_ids_BS,
            )
            (output.loss / len(micro_batches)).backward()
            total += float(output.nll) / tokens / len(micro_batches)
        if self.recipe.train.grad_clip > 0:
            # Over all parameters, as the engine clips.
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.train.grad_clip)
        self.optimizer.step()
        return total


class Measured(NamedTuple):
    """One kind of layer after a step.

    Attributes:
        size: root mean square over all elements of all such layers.
        change: root mean square of the difference from before the first step; None if the rows
            have another order after each step.
    """

    size: float
    change: float | None


@dataclass(frozen=True)
class Coordinates:
    """The measurements of one model.

    ``steps[t][layer]`` is after t optimizer steps; ``losses`` are before each step.
    """

    kind: Kind
    width: int
    steps: list[dict[str, Measured]]
    losses: list[float]


def measure(recipe: Recipe, kind: Kind, batches: Batches, num_steps: int) -> Coordinates:
    """Trains a model for a few steps, measuring it on one micro batch before and after each."""
    training = PlainTraining(recipe)
    # Always the same text, so that a change comes from the weights alone.
    probe = batches(0)[0]
    first = activations(training.model, probe)
    steps = [{name: _measured(name, tensors, tensors) for name, tensors in first.items()}]
    losses: list[float] = []
    for step in range(num_steps):
        losses.append(training.step(batches(step)))
        after = activations(training.model, probe)
        steps.append(
            {name: _measured(name, tensors, first[name]) for name, tensors in after.items()}
        )
    return Coordinates(kind, recipe.model.hidden_size, steps, losses)


def _measured(name: str, tensors: list[torch.Tensor], first: list[torch.Tensor]) -> Measured:
    size = _root_mean_square(tensors)
    # Rows are sorted by expert, and routing changes: the difference of two steps would mix tokens.
    if name == "experts":
        return Measured(size, None)
    return Measured(
        size,
        _root_mean_square([after - before for after, before in zip(tensors, first, strict=True)]),
    )


def _root_mean_square(tensors: list[torch.Tensor]) -> float:
    # fp64: the sum over millions of squares would lose digits in fp32.
    squares = sum(float(tensor.double().square().sum()) for tensor in tensors)
    return math.sqrt(squares / sum(tensor.numel() for tensor in tensors))


@torch.no_grad()
def activations(model: DecoderLM, batch: Batch) -> dict[str, list[torch.Tensor]]:
    """The outputs of each kind of layer in evaluation mode.

    Scores [B, N, S, S] are those of visible keys, the others are zero.
    """
    model.eval()
    found: dict[str, list[torch.Tensor]] = {}
    with _recording(model, found):
        logits = model.logits(
            batch.input_ids_BS, batch.document_ids_BS, position_ids_BS=batch.position_ids_BS
        )
    found["logits"] = [logits]
    return found


@contextmanager
def _recording(model: DecoderLM, found: dict[str, list[torch.Tensor]]) -> Iterator[None]:
    """Stores the outputs of layers in ``found`` while the block runs."""

    def keep(
        name: str, pick: Callable[[Any], torch.Tensor] = lambda output: output
    ) -> Callable[..., None]:
        return lambda _module, _inputs, output: found.setdefault(name, []).append(
            pick(output).detach().float()
        )

    def scored(kernel: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def attend(
            q_BNSH: torch.Tensor, k_BMUH: torch.Tensor, v_BMUV: torch.Tensor, scores: Any
        ) -> torch.Tensor:
            k_BNUH = k_BMUH.repeat_interleave(q_BNSH.shape[1] // k_BMUH.shape[1], dim=1)
            found.setdefault("attention scores", []).append(
                (scores.scale * q_BNSH.float() @ k_BNUH.float().mT).tril()
            )
            return kernel(q_BNSH, k_BMUH, v_BMUV, scores)

        return attend

    handles = [model.embedding.register_forward_hook(keep("embedding"))]
    kernels: list[tuple[Any, Any]] = []
    blocks: list[Any] = list(model.layers)
    for block in blocks:
        kernels.append((block.attention, block.attention.kernel))
        block.attention.kernel = scored(block.attention.kernel)
        handles.append(block.attention.register_forward_hook(keep("attention")))
        handles.append(
            block.feed_forward.register_forward_hook(
                keep(
                    "feed-forward",
                    lambda output: output[0] if isinstance(output, tuple) else output,
                )
            )
        )
        handles.append(
            block.register_forward_hook(keep("residual stream", lambda output: output[0]))
        )
    for module in model.modules():
        if isinstance(module, TopKRouter):
            handles.append(
                module.register_forward_hook(keep("router logits", lambda output: output.logits_TE))
            )
        elif isinstance(module, Experts):
            handles.append(module.register_forward_hook(keep("experts")))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for attention, kernel in kernels:
            attention.kernel = kernel


def slope(widths: Sequence[int], sizes: Sequence[float]) -> float:
    """The power of the width that sizes grow with: least squares of log2(size) on log2(width)."""
    x = torch.tensor(widths, dtype=torch.float64).log2()
    y = torch.tensor(sizes, dtype=torch.float64).clamp_min(1e-30).log2()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


class LayerGrowth(TypedDict):
    """How a kind of layer's outputs grow with the width.

    ``sizes`` has a list for each step, with an element for each width; ``slopes`` has the power of
    the width for each step. ``change_slope`` is the power for the change since the start, None if
    it was not measured. ``verdict`` is that of the last slope, see :func:`verdict_on`.
    """

    sizes: list[list[float]]
    slopes: list[float]
    change_slope: float | None
    verdict: str


class GrowthSummary(TypedDict):
    """The last loss of each width, and the growth of each kind of layer."""

    losses: list[float]
    layers: dict[str, LayerGrowth]


def summary(measured: Sequence[Coordinates]) -> GrowthSummary:
    """The growth over models of one kind, given from narrow to wide."""
    widths = [one.width for one in measured]
    layers: dict[str, LayerGrowth] = {}
    for name in measured[0].steps[0]:
        sizes = [
            [one.steps[step][name].size for one in measured]
            for step in range(len(measured[0].steps))
        ]
        slopes = [slope(widths, of_step) for of_step in sizes]
        changes = [change for one in measured if (change := one.steps[-1][name].change) is not None]
        layers[name] = {
            "sizes": sizes,
            "slopes": slopes,
            "change_slope": slope(widths, changes) if changes else None,
            "verdict": verdict_on(name, slopes[-1]),
        }
    return {"losses": [one.losses[-1] for one in measured], "layers": layers}


def verdict_on(layer: str, power: float) -> str:
    """``stable``, ``grows``, ``shrinks`` or ``smaller start``.

    The last is for outputs that shrink with about the square root of the width, as random ones do.
    """
    if abs(power) <= TOLERANCE:
        return "stable"
    if power > 0:
        return "grows"
    return "smaller start" if layer in OUTPUTS and power >= SMALLER_START else "shrinks"


def batches_of(
    recipe: Recipe, source: Literal["auto", "data", "random"]
) -> tuple[Recipe, str, Batches]:
    """The recipe with the size of its vocabulary, the source of tokens, and each step's batches.

    Args:
        source: ``auto`` takes the recipe's data if they have been built, and random tokens if not.

    Raises:
        DataError: if the data are asked for and have not been built.
    """
    folders = data_folders(recipe.data, recipe.data_path)
    built = all(manifest_path(folder).is_file() for folder in folders.values())
    if source == "random" or (source == "auto" and not built):
        recipe = with_vocabulary(
            recipe, recipe.model.vocab_size or recipe.data.tokenizer.vocab_size or RANDOM_VOCABULARY
        )
        return recipe, "random", lambda step: random_batches(recipe, step)
    datasets = load_datasets(folders)
    loader = open_shard_loader(recipe.data, datasets, loader_plan(recipe), 0, 1)
    return (
        with_vocabulary(recipe, recipe.model.vocab_size or datasets.tokenizer.vocab_size),
        "data",
        loader.step_batches,
    )


def with_vocabulary(recipe: Recipe, vocab_size: int) -> Recipe:
    """The recipe with another size of the vocabulary."""
    return recipe.model_copy(
        update={"model": recipe.model.model_copy(update={"vocab_size": vocab_size})}
    )


def random_batches(recipe: Recipe, step: int) -> list[Batch]:
    """Random micro batches of a step, always the same ones.

    Token n is drawn 1 / (n + 1) times as often as token 0, as in natural text: from uniform tokens
    a model could learn nothing.
    """
    assert recipe.model.vocab_size is not None
    train = recipe.train
    frequencies_V = 1.0 / torch.arange(1, recipe.model.vocab_size + 1)
    generator = torch.Generator().manual_seed(recipe.seed + step)
    drawn = torch.multinomial(
        frequencies_V,
        train.global_batch_size * (train.sequence_length + 1),
        replacement=True,
        generator=generator,
    )
    parts = drawn.view(train.global_batch_size, -1).split(train.micro_batch_size)
    return [Batch(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in parts]
