"""Trains one combination of options, saves, resumes in a new engine, loads the weights, generates.

A case has "name", "folder", "overrides", "zero", and optionally "sabotage": a deliberate fault that
the tests must notice.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoint import engine_state
from pretrain.checkpoint.layout import damage
from pretrain.checkpoint.store import CheckpointStore
from pretrain.checkpoint.weights import load_model
from pretrain.config.load import load_recipe
from pretrain.config.recipe import Recipe
from pretrain.engine.engine import Engine
from pretrain.engine.step import reduce_steps
from pretrain.evaluation.generation.generate import NextLogits, generate, native_next_logits
from pretrain.evaluation.generation.sampling import Sampling
from pretrain.evaluation.heldout.perplexity import evaluate
from pretrain.model.decoder import DecoderLM
from tests.support.rank_worker import make_engine
from tests.support.workers.training_steps import synthetic_step

STEPS, SAVED_AT, NEW_TOKENS = 6, 3, 8
PROMPT = [5, 17, 99, 3, 64, 12]
NO_END = -1


class Run:
    """One case's engine and its checkpoints."""

    def __init__(self, recipe: Recipe, zero: int, folder: Path) -> None:
        self.engine, ds_config = make_engine(recipe, zero)
        self.recipe, self.topology = recipe, self.engine.topology
        self.store = CheckpointStore(
            folder / "checkpoints", self.engine, ds_config, folder / "tokenizer.json"
        )

    def batches(self, step: int) -> list[Any]:
        return synthetic_step(self.recipe, step, self.topology.dp_rank, self.topology.dp_size)

    def train(self, steps: int) -> list[list[Any]]:
        """Losses, gradient norm and the experts' counts of each step; always on the same batch, so
        that the loss has to fall.
        """
        moe = self.recipe.model.moe
        rate = moe.bias_balancing.update_rate if getattr(moe, "bias_balancing", None) else 0.0
        results = [self.engine.train_step(self.batches(0), 1.0, rate) for _ in range(steps)]
        losses, _ = reduce_steps(results, self.topology)
        counts = [
            [] if result.router is None else result.router.counts_LE.tolist() for result in results
        ]
        return [
            [loss.cross_entropy, loss.total, result.grad_norm, count]
            for loss, result, count in zip(losses, results, counts, strict=True)
        ]

    def validation_loss(self) -> float:
        nll, tokens = self.engine.evaluate(self.batches(77))
        return nll / tokens


def sabotage(kind: str) -> None:
    """Breaks one thing about resuming on purpose."""
    if kind == "optimizer_forgotten":
        engine_state.load_optimizer = lambda *_: None
    elif kind == "counts_forgotten":  # dropout follows from the number of the step
        Engine.restore_counts = lambda *_: None  # type: ignore[method-assign]
    else:
        raise ValueError(kind)


def without_cache(model: DecoderLM) -> NextLogits:
    """All tokens through the whole model, each time."""
    tokens_BS = torch.empty(1, 0, dtype=torch.int64)

    @torch.inference_mode()
    def next_logits(added_BS: torch.Tensor) -> torch.Tensor:
        nonlocal tokens_BS
        tokens_BS = torch.cat((tokens_BS, added_BS), dim=1)
        return model.logits(tokens_BS)[:, -1]

    return next_logits


def remembering_nothing(model: DecoderLM) -> NextLogits:
    """What a cache that has lost everything would do: its results have to differ."""
    return torch.inference_mode()(lambda added_BS: model.logits(added_BS)[:, -1])


def use_weights(run: Run, checkpoint: Path) -> dict[str, Any]:
    """What a single process makes of a checkpoint without DeepSpeed: its loss, and greedy text with
    the cache and without.
    """
    model, recipe = load_model(checkpoint)
    scored = evaluate(model, synthetic_step(recipe, 77, 0, 1), torch.device("cpu"))
    length = len(PROMPT) + NEW_TOKENS
    text, logits_SV = greedy(without_cache(model))
    result = {"loaded_loss": scored.loss, "same_recipe": recipe == run.recipe, "text": text}
    ways = {
        "cached": native_next_logits(model, length, torch.device("cpu")),
        "forgetful": remembering_nothing(model),
    }
    for way, next_logits in ways.items():
        result[f"{way}_text"], other_SV = greedy(next_logits)
        result[f"{way}_difference"] = (other_SV - logits_SV).abs().max().item()
    return result


def greedy(next_logits: NextLogits) -> tuple[list[int], torch.Tensor]:
    """The likeliest continuation of the prompt, and the logits [S, V] that each token was chosen
    by.
    """
    seen: list[torch.Tensor] = []

    def remembered(added_BS: torch.Tensor) -> torch.Tensor:
        seen.append(next_logits(added_BS))
        return seen[-1]

    return generate(
        remembered, PROMPT, Sampling(greedy=True), NO_END, range(NEW_TOKENS)
    ), torch.cat(seen)


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    parts = Engine.restore_counts, engine_state.load_optimizer
    try:
        return trained_and_resumed(case)
    finally:
        # A deliberate fault ends with its case.
        Engine.restore_counts, engine_state.load_optimizer = parts  # type: ignore[method-assign]


def trained_and_resumed(case: dict[str, Any]) -> dict[str, Any]:
    recipe, folder = load_recipe("debug", case["overrides"]), Path(case["folder"])
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text("{}")
    whole = Run(recipe, case["zero"], folder)
    curve = whole.train(SAVED_AT)
    checkpoint = whole.store.save(SAVED_AT, {"step": SAVED_AT})
    validation = whole.validation_loss()
    curve += whole.train(STEPS - SAVED_AT)

    resumed = Run(recipe, case["zero"], folder)
    if "sabotage" in case:
        sabotage(case["sabotage"])
    loaded = resumed.store.load(resumed.store.newest() or Path("nothing was saved"))
    result = {
        "name": case["name"],
        "validation": validation,
        "resumed_validation": resumed.validation_loss(),
    }
    result |= {
        "curve": curve,
        "resumed_at": loaded.state["step"],
        "resumed": resumed.train(STEPS - SAVED_AT),
        "damage": damage(checkpoint),
    }
    if whole.topology.is_main:
        result |= use_weights(whole, checkpoint)
    whole.topology.barrier()
    return result
