"""The model card (Mitchell et al. 2019) of a run, a checkpoint or an export: README.md, in the form
that the Hugging Face hub reads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from pretrain.config.recipe import Recipe
from pretrain.config.timeline import Timeline

INTENDED_USE = (
    "Research on the pretraining of language models. It is a base model: it continues a text, and"
    " follows no instructions."
)
LIMITS = (
    "It repeats errors, gaps and prejudices of its training text, may invent facts, and was not"
    " tested for safety."
)
NO_LICENSE = (
    "Not stated. Set `card.license` in the recipe before you share the weights, and heed the"
    " licences of the data."
)


def model_card(
    recipe: Recipe, state: Mapping[str, Any], results: Mapping[str, float] | None = None
) -> str:
    """The card's text.

    Args:
        state: of a checkpoint: ``step``, ``consumed_tokens``, ``validation_loss`` with its
            ``validation_step`` and ``validation_targets``, ``progress``, ``parameters`` and
            ``sources``; what is missing is left out of the card.
        results: other measured numbers by name, such as those of tasks.
    """
    card = recipe.card
    sections = {
        "Intended use": [card.intended_use or INTENDED_USE],
        "Limits": [card.limits or LIMITS],
        "Data": _data(recipe, state),
        "Training": _training(recipe, state),
        "Results": _results(state, results or {}),
        "Licence": [card.license or NO_LICENSE],
    }
    lines = [*_front_matter(recipe), f"# {recipe.name}", "", _summary(recipe, state), ""]
    for title, content in sections.items():
        lines += [f"## {title}", "", *content, ""]
    return "\n".join(lines)


def _front_matter(recipe: Recipe) -> list[str]:
    moe = ["mixture-of-experts"] if recipe.model.moe_layers else []
    fields = {
        "license": recipe.card.license,
        "base_model": recipe.card.base_model,
        "pipeline_tag": "text-generation",
        "tags": ["pretraining", *moe],
    }
    given = {name: value for name, value in fields.items() if value is not None}
    return ["---", yaml.safe_dump(given, sort_keys=False).rstrip("\n"), "---", ""]


def _summary(recipe: Recipe, state: Mapping[str, Any]) -> str:
    parameters, model, moe = state.get("parameters"), recipe.model, recipe.model.moe
    size = (
        f" with {parameters['total']:,} parameters, of which a token uses {parameters['active']:,}"
        if parameters
        else ""
    )
    experts = (
        f", {len(model.moe_layers)} of them with {moe.total_experts:,} experts each"
        if moe is not None and model.moe_layers
        else ""
    )
    tokens = (
        f", pretrained on {state['consumed_tokens']:,} tokens"
        if state.get("consumed_tokens")
        else ""
    )
    return (
        f"A decoder language model{size}: {model.num_hidden_layers} layers{experts}{tokens}. Every"
        " setting is in `recipe.yaml` of the run."
    )


def _data(recipe: Recipe, state: Mapping[str, Any]) -> list[str]:
    sources, origins = state.get("sources", {}), recipe.card.data_origin
    if not sources:
        return [
            (
                "Read from its sources while training went on; `data` in the recipe names them."
                if recipe.data.streaming
                else "Not recorded."
            )
        ]
    rows = [
        [
            name,
            source["kind"],
            source["documents"],
            source["tokens"],
            source["share"],
            origins.get(name),
        ]
        for name, source in sources.items()
    ]
    epochs = state.get("epoch")
    passes = "" if epochs is None else f"; the run made {epochs:.2f} passes over the training split"
    return [
        *table(["source", "kind", "documents", "tokens", "share", "origin and licence"], rows),
        "",
        f"Shares are of the training split. The mixture is `{recipe.data.mixture.kind}`{passes}.",
    ]


def _training(recipe: Recipe, state: Mapping[str, Any]) -> list[str]:
    train, optimizer, schedule, timeline = (
        recipe.train,
        recipe.optimizer,
        recipe.schedule,
        Timeline(recipe),
    )
    sizes = [(stage.name, stage.recipe.train) for stage in timeline.stages]
    rows: list[list[Any]] = [
        ["steps", f"{state['step']:,} of {timeline.num_steps:,}" if state.get("step") else None],
        *(
            [
                f"batch {name}".strip(),
                f"{now.global_batch_size} sequences of {now.sequence_length} tokens",
            ]
            for name, now in sizes
        ),
        [
            "optimizer",
            (
                f"{optimizer.kind}, peak learning rate {optimizer.learning_rate:g}, {schedule.kind}"
                f" schedule, {schedule.warmup_steps} warm-up steps"
            ),
        ],
        ["precision", train.precision],
        ["seed", str(recipe.seed)],
        ["goes on from", recipe.branch_from],
        [
            "initial weights",
            recipe.initial_weights
            and f"{recipe.initial_weights}{' (in part)' if recipe.initial_weights_partial else ''}",
        ],
    ]
    return table(["what", "value"], [row for row in rows if row[1] is not None])


def _results(state: Mapping[str, Any], results: Mapping[str, float]) -> list[str]:
    progress, rows = state.get("progress", {}), []
    if (loss := state.get("validation_loss")) is not None:
        step, targets = state.get("validation_step"), state.get("validation_targets")
        when = "" if step is None else f", at step {step:,}"
        of = "" if targets is None else f", over {targets:,} tokens"
        rows += [
            [f"validation loss, nats a token{when}{of}", loss],
            [f"validation perplexity{when}", _perplexity(loss)],
        ]
    if (best := progress.get("best_validation")) is not None:
        rows.append([f"best validation loss, at step {progress['best_step']:,}", best])
    rows += [[name, value] for name, value in results.items()]
    return table(["measured", "value"], rows) if rows else ["None were measured."]


def _perplexity(loss: float) -> float | None:
    return math.exp(loss) if loss < 700 else None


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = [columns, ["---"] * len(columns), *([_shown(cell) for cell in row] for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    text = (
        f"{value:.4f}"
        if isinstance(value, float)
        else f"{value:,}"
        if isinstance(value, int)
        else str(value)
    )
    return text.replace("|", "\\|").replace("\n", " ")
