"""The model card (Mitchell et al. 2019) of a run, a checkpoint or an export.

It is README.md in the form that the Hugging Face hub reads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import yaml

from data_pipeline.sources.origins import origin_of
from pretrain.checkpoint.card_hardware import hardware_formulas, hardware_rows
from pretrain.checkpoint.state import CheckpointState
from pretrain.config.epochs import with_placeholder_length
from pretrain.config.recipe import Recipe
from pretrain.config.timeline import Timeline, has_known_length

INTENDED_USE = (
    "Research on the pretraining of language models. It is a base model: it continues a text, and "
    "follows no instructions."
)
LIMITS = (
    "It repeats errors, gaps and prejudices of its training text, may invent facts, and was not "
    "tested for safety."
)
ETHICS = (
    "A base model writes whatever resembles its training text: that may be offensive, false, "
    "private or under somebody's copyright. Nothing was done here to prevent it. Do not let it "
    "decide about people, and look at its output before anybody else does; before it is put to use, "
    "measure its errors for those whom they would hit."
)
NO_LICENSE = (
    "Not stated. Set `card.license` in the recipe before you share the weights, and heed the "
    "licences of the data."
)
# exp() of more overflows a double.
LARGEST_EXPONENT = 700.0

Cell = str | int | float | None


def model_card(
    recipe: Recipe, state: CheckpointState, results: Mapping[str, float] | None = None
) -> str:
    """Return the card's text.

    Args:
        state: of a checkpoint; what it does not say is left out of the card.
        results: further measured values by name, such as those of tasks.
    """
    card = recipe.card
    sections = {
        "Intended use": [card.intended_use or INTENDED_USE],
        "Limits": [card.limits or LIMITS],
        "Ethics": [card.ethics or ETHICS],
        "Data": _data(recipe, state),
        "Training": _training(recipe, state),
        "Results": _results(state, results or {}),
        "Hardware and energy": _hardware(recipe, state),
        "Licence": [card.license or NO_LICENSE],
    }
    if card.contact is not None:
        sections["Contact"] = [card.contact]
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
    # What the recipe does not say is left out: null would be an entry.
    known = {name: value for name, value in fields.items() if value is not None}
    return ["---", yaml.safe_dump(known, sort_keys=False).rstrip("\n"), "---", ""]


def _summary(recipe: Recipe, state: CheckpointState) -> str:
    model = recipe.model
    # A checkpoint of converted weights knows neither parameters nor tokens.
    size = ""
    if parameters := state.get("parameters"):
        size = (
            f" with {parameters['total']:,} parameters, "
            f"of which a token uses {parameters['active']:,}"
        )
    experts = ""
    if model.moe is not None and model.moe_layers:
        experts = f", {len(model.moe_layers)} of them with {model.moe.total_experts:,} experts each"
    tokens = ""
    if state.get("consumed_tokens"):
        tokens = f", pretrained on {state['consumed_tokens']:,} tokens"
    return (
        f"A decoder language model{size}: {model.num_hidden_layers} layers{experts}{tokens}. "
        "Every setting is in `recipe.yaml` of the run."
    )


def _data(recipe: Recipe, state: CheckpointState) -> list[str]:
    sources = state.get("sources")
    if not sources:
        if not recipe.data.streaming:
            return ["Not recorded."]
        named = recipe.data.named_sources
        streamed: list[list[Cell]] = [
            [name, source.kind, recipe.card.data_origin.get(name) or origin_of(source)]
            for name, source in named.items()
        ]
        columns = ["source", "kind", "origin and licence"]
        return ["Read from its sources during training:", "", *table(columns, streamed)]
    rows: list[list[Cell]] = [
        [
            name,
            source["kind"],
            source["documents"],
            source["tokens"],
            source["share"],
            recipe.card.data_origin.get(name) or _known_origin(recipe, name, source["kind"]),
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


def _known_origin(recipe: Recipe, name: str, kind: str) -> str | None:
    """Return the origin of a source that the recipe still names as the data records it."""
    # Data of several folders have names of their own, of which the recipe knows no sources.
    source = None if recipe.data.corpora else recipe.data.named_sources.get(name)
    return origin_of(source) if source is not None and source.kind == kind else None


def _hardware(recipe: Recipe, state: CheckpointState) -> list[str]:
    use = state.get("hardware")
    # Weights of no run, and a run that was counted by an earlier version.
    if not use or not use["device_seconds"]:
        return ["Not recorded."]
    rows: list[list[Cell]] = hardware_rows(recipe.card, use)
    formulas = [f"* {line}" for line in hardware_formulas(recipe.card, use)]
    return [*table(["what", "value"], rows), "", *formulas]


def _training(recipe: Recipe, state: CheckpointState) -> list[str]:
    optimizer = recipe.optimizer
    schedule = recipe.schedule
    # Exports make a card of a recipe alone, so there is no run to take the timeline from. One that
    # counts in epochs and was never trained has no length.
    timeline = Timeline(with_placeholder_length(recipe))
    warmup: object = "an unknown number of"
    if has_known_length(recipe) or not schedule.warmup_share:
        warmup = schedule.warmup_of(timeline.num_steps)
    rows: list[list[Cell]] = []
    if state.get("step") and has_known_length(recipe):
        rows.append(["steps", f"{state['step']:,} of {timeline.num_steps:,}"])
    for phase in timeline.phases:
        train = phase.recipe.train
        batch = f"{train.global_batch_size} sequences of {train.sequence_length} tokens"
        rows.append([f"batch {phase.name}".strip(), batch])
    rows += [
        [
            "optimizer",
            f"{optimizer.kind}, peak learning rate {optimizer.learning_rate:g}, "
            f"{schedule.kind} schedule, {warmup} warm-up steps",
        ],
        ["precision", recipe.train.precision],
        ["seed", str(recipe.seed)],
    ]
    if recipe.branch_from is not None:
        rows.append(["continues from", recipe.branch_from])
    if recipe.initial_weights is not None:
        partial = " (in part)" if recipe.initial_weights_partial else ""
        rows.append(["initial weights", f"{recipe.initial_weights}{partial}"])
    return table(["what", "value"], rows)


def _results(state: CheckpointState, results: Mapping[str, float]) -> list[str]:
    progress = state.get("progress", {})
    rows: list[list[Cell]] = []
    if (loss := state.get("validation_loss")) is not None:
        step = state.get("validation_step")
        targets = state.get("validation_targets")
        when = "" if step is None else f", at step {step:,}"
        over = "" if targets is None else f", over {targets:,} tokens"
        rows += [
            [f"validation loss, nats a token{when}{over}", loss],
            [f"validation perplexity{when}", perplexity_of(loss)],
        ]
    # Of samples of the split, so it need not be below the loss of the whole split.
    if (best := progress.get("best_validation")) is not None:
        rows.append([f"best validation loss, at step {progress['best_step']:,}", best])
    rows += [[name, value] for name, value in results.items()]
    return table(["measured", "value"], rows) if rows else ["None were measured."]


def perplexity_of(loss: float) -> float | None:
    """Return the perplexity, or None instead of an infinity, which JSON does not have."""
    return math.exp(loss) if loss < LARGEST_EXPONENT else None


def table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = [columns, ["---"] * len(columns), *([_shown(cell) for cell in row] for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _shown(value: Cell) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        text = f"{value:.4f}"
    elif isinstance(value, int):
        text = f"{value:,}"
    else:
        text = value
    # A bar would end the cell, a line break the row.
    return text.replace("|", "\\|").replace("\n", " ")
