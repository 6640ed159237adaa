"""Rules about a recipe's phases, one small function each, which raises ConfigError."""

from __future__ import annotations

from collections.abc import Callable

from pretrain.config.recipe import Recipe
from pretrain.config.timeline import (
    has_known_length,
    length_field,
    planned_tokens,
    recipe_in_phase,
)
from pretrain.core.errors import ConfigError


def phases_have_names_of_their_own(recipe: Recipe) -> None:
    """Two phases must not have one name."""
    names = [phase.name for phase in recipe.phases]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"phases: two are called '{name}': give each a name of its own")


def phases_fill_the_run(recipe: Recipe) -> None:
    """Together the phases must take the tokens of the run."""
    phases = recipe.phases
    if not phases:
        return
    for phase in phases[:-1]:
        if phase.tokens is None:
            raise ConfigError(
                f"phases.{phase.name}.tokens is missing: only the last phase may leave it out"
            )
    if phases[-1].tokens is not None and recipe.train.epochs is not None:
        raise ConfigError(
            f"phases.{phases[-1].name}.tokens is given, and the run's length in epochs: leave the "
            "tokens of the last phase out, so that it takes the rest of train.epochs"
        )
    if not has_known_length(recipe):
        return
    # The last phase takes the rest of the run, which must not be empty.
    total = planned_tokens(recipe)
    field = length_field(recipe)
    phase_tokens = sum(phase.tokens or 0 for phase in phases)
    if phases[-1].tokens is None and phase_tokens >= total:
        given = "" if recipe.train.epochs is None else f"{recipe.train.epochs:g}, which makes "
        raise ConfigError(
            f"phases before '{phases[-1].name}' take {phase_tokens} tokens, and "
            f"{field} is {given}{total}: raise {field}, or shorten a phase"
        )
    if phases[-1].tokens is not None and phase_tokens != total:
        raise ConfigError(
            f"phases take {phase_tokens} tokens together, but train.train_tokens is {total}: "
            "make them equal, or leave the last one's out"
        )


def phase_lengths_divide(recipe: Recipe) -> None:
    """The longest sequence must be a multiple of all others: they share blocks of its length."""
    lengths = {
        phase.name: phase.sequence_length or recipe.train.sequence_length for phase in recipe.phases
    }
    longest = max(lengths.values(), default=0)
    for name, length in lengths.items():
        if longest % length:
            raise ConfigError(
                f"phases.{name}.sequence_length ({length}) does not divide the longest of the run "
                f"({longest}): one order of the data serves all lengths, so choose a divisor"
            )


def phase_positions_need_no_training(recipe: Recipe) -> None:
    """Phases may change how a rotary embedding is computed, but no parameter or penalty."""
    before = recipe.model.position
    for phase in recipe.phases:
        now = phase.position
        if now is None or now == before:
            continue
        names = [position.kind for position in (before, now)]
        if not (before.rotary and now.rotary) or before.alibi != now.alibi:
            raise ConfigError(
                f"phases.{phase.name}.position has kind={names[1]} in a model of kind={names[0]}: "
                "only the base of a rotary embedding can change in a run, and rope can become "
                "yarn or llama3"
            )
        # The weights were trained with scaled angles, and plain RoPE would undo the scaling.
        if names[0] in ("yarn", "llama3") and names[1] != names[0]:
            raise ConfigError(
                f"phases.{phase.name}.position takes {names[0]} away from the model: write kind: "
                f"{names[0]} with its factor"
            )


def phase_mixtures_are_shares(recipe: Recipe) -> None:
    """A mixture of token counts is for a whole run."""
    changed = [phase for phase in recipe.phases if phase.mixture is not None]
    for phase in changed:
        if phase.mixture is not None and phase.mixture.total_tokens is not None:
            raise ConfigError(
                f"phases.{phase.name}.mixture.kind=tokens is for whole runs: give shares with "
                "kind=weights; the phase says its tokens"
            )
    if changed and recipe.data.mixture.total_tokens is not None:
        raise ConfigError(
            f"data.mixture.kind=tokens is for whole runs, and phases.{changed[0].name} has "
            "another mixture: use kind=weights"
        )


def phases_fit_a_stream(recipe: Recipe) -> None:
    """A stream has one mixture and one shape of batches."""
    if not recipe.data.streaming:
        return
    for phase in recipe.phases:
        for field in ("global_batch_size", "micro_batch_size", "sequence_length", "mixture"):
            if getattr(phase, field) is not None:
                raise ConfigError(
                    f"phases.{phase.name}.{field} does not go with data.streaming: leave it out, "
                    "or build shards"
                )


def phases_fit_megatrons_order(recipe: Recipe) -> None:
    """Megatron's order is of one sequence length and one blend."""
    if not recipe.data.order.is_megatrons:
        return
    for phase in recipe.phases:
        for field in ("sequence_length", "mixture"):
            if getattr(phase, field) is not None:
                raise ConfigError(
                    f"phases.{phase.name}.{field} does not go with data.order=megatron, whose order "
                    "is of one sequence length and one blend: leave it out"
                )


def weights_come_from_one_place(recipe: Recipe) -> None:
    """A branch has weights already."""
    if recipe.branch_from is not None and recipe.initial_weights is not None:
        raise ConfigError(
            "branch_from continues a whole run, initial_weights starts a new one: "
            "leave one of them out"
        )


PHASE_RULES: tuple[Callable[[Recipe], None], ...] = (
    phases_have_names_of_their_own,
    phases_fill_the_run,
    phase_lengths_divide,
    phase_positions_need_no_training,
    phase_mixtures_are_shares,
    phases_fit_a_stream,
    phases_fit_megatrons_order,
    weights_come_from_one_place,
)


def phase_warnings(recipe: Recipe) -> list[str]:
    """Return sentences about phases that can run, but may not do what their author expects."""
    # A shorter phase reads parts of packs that were made for the longest sequence.
    lengths = {recipe_in_phase(recipe, phase).train.sequence_length for phase in recipe.phases}
    if recipe.data.packing.is_planned and len(lengths) > 1:
        return [
            "data.packing.kind=best_fit packs for the longest sequence of the phases, and shorter "
            "phases read parts of such packs: they cut documents that a packing of their own "
            "would not"
        ]
    return []
