"""Which phase each step of a run belongs to, and what was consumed before it.

All of it is a pure function of the recipe and the step. Steps, tokens and samples are counted here
and nowhere else. A run without phases is one phase of the whole recipe.

Sequences of several lengths share one order, which goes over blocks of the run's longest sequence.
A step of B shorter sequences reads one window of each of B blocks, and the following steps read the
next windows of the same blocks until they are used up. So a phase takes whole blocks: its steps are
a multiple of longest / own length, and its tokens are rounded up to that. No token comes twice
before its source's epoch ends, whatever the lengths, as long as the longest one does not change.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from fractions import Fraction

from pretrain.config.phases import PhaseConfig
from pretrain.config.recipe import Recipe
from pretrain.config.schedules import PhaseSchedule
from pretrain.core.errors import ConfigError

SIZES = ("global_batch_size", "micro_batch_size", "sequence_length")


def recipe_in_phase(recipe: Recipe, phase: PhaseConfig) -> Recipe:
    """Return the recipe as it is in one of its phases: without phases, with its changes."""
    # "phases": [] makes the result a recipe without phases, whose timeline is one phase.
    sizes = {name: value for name in SIZES if (value := getattr(phase, name)) is not None}
    changed: dict[str, object] = {"phases": [], "train": recipe.train.model_copy(update=sizes)}
    if phase.position is not None:
        changed["model"] = recipe.model.model_copy(update={"position": phase.position})
    if phase.mixture is not None:
        changed["data"] = recipe.data.model_copy(update={"mixture": phase.mixture})
    return recipe.model_copy(update=changed)


@dataclass(frozen=True)
class Phase:
    """A phase in its place.

    Attributes:
        name: "" for a run without phases.
        number: from 1.
        recipe: as it is in this phase, see :func:`recipe_in_phase`.
        schedule: the phase's own; None if the recipe's holds.
        frozen: names and patterns of what is not trained.
        first_step, first_tokens, first_block: steps, tokens and blocks before it.
        slices: sequences in a block, which is also how many steps read one group of blocks.
    """

    name: str
    number: int
    recipe: Recipe
    schedule: PhaseSchedule | None
    frozen: tuple[str, ...]
    first_step: int
    num_steps: int
    first_tokens: int
    first_block: int
    slices: int

    @property
    def end_step(self) -> int:
        """The first step after it, from 0; its last step, from 1."""
        return self.first_step + self.num_steps

    @property
    def num_tokens(self) -> int:
        """Tokens of all its steps."""
        return self.num_steps * self.recipe.train.tokens_per_step

    def __str__(self) -> str:
        steps = f"steps {self.first_step + 1} to {self.end_step}"
        return f"phase {self.number}, '{self.name}': {steps}"


def block_tokens(recipe: Recipe) -> int:
    """Return the longest sequence of the run, which is one sample of its data."""
    lengths = [recipe_in_phase(recipe, section).train.sequence_length for section in recipe.phases]
    return max(lengths, default=recipe.train.sequence_length)


def has_known_length(recipe: Recipe) -> bool:
    """Whether the recipe alone says how many steps its run has."""
    return recipe.train.epochs is None or recipe.train.epoch_samples is not None


def length_field(recipe: Recipe) -> str:
    """Return the field that the run's length is given by, for sentences."""
    return "train.train_tokens" if recipe.train.epochs is None else "train.epochs"


def planned_tokens(recipe: Recipe) -> int:
    """Return the tokens of the whole run, before they are rounded up to whole steps.

    Raises:
        ConfigError: if the length is given in epochs, and the data are not known yet.
    """
    train = recipe.train
    if train.epochs is None:
        assert train.train_tokens is not None
        return train.train_tokens
    if train.epoch_samples is None:
        raise ConfigError(
            f"train.epochs is {train.epochs:g}, and how long an epoch is is not known before there "
            f"are data in {recipe.data_path}: build them, or give train.train_tokens instead"
        )
    # The decimal number that was written: 0.1 is a tenth, not the nearest binary fraction.
    samples = math.ceil(Fraction(repr(train.epochs)) * train.epoch_samples)
    return samples * block_tokens(recipe)


class Timeline:
    """The phases of a run, one after the other.

    Raises:
        ConfigError: see :func:`planned_tokens`.

    Attributes:
        block_tokens: the longest sequence of the run.
        phases: in their order; at least one.
        num_steps, num_tokens: of the whole run.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.block_tokens = block_tokens(recipe)
        self.phases: list[Phase] = []
        # The last phase may leave its tokens out, and takes the rest of the run.
        rest = planned_tokens(recipe) - sum(section.tokens or 0 for section in recipe.phases)
        step = 0
        tokens = 0
        block = 0
        for number, section in enumerate(recipe.phases or [None], start=1):
            now = recipe if section is None else recipe_in_phase(recipe, section)
            slices = self.block_tokens // now.train.sequence_length
            wanted = rest if section is None or section.tokens is None else section.tokens
            # Groups of global_batch_size blocks, rounded up: each is read in ``slices`` steps.
            groups = -(-wanted // (now.train.tokens_per_step * slices))
            phase = Phase(
                name="" if section is None else section.name,
                number=number,
                recipe=now,
                schedule=None if section is None else section.schedule,
                frozen=() if section is None else tuple(section.frozen),
                first_step=step,
                num_steps=groups * slices,
                first_tokens=tokens,
                first_block=block,
                slices=slices,
            )
            self.phases.append(phase)
            step = phase.end_step
            tokens += phase.num_tokens
            block += groups * now.train.global_batch_size
        self.num_steps = step
        self.num_tokens = tokens
        self._starts = [phase.first_step for phase in self.phases]

    def at(self, step: int) -> Phase:
        """Return the phase of step ``step`` (from 0); after the run's end, the last one."""
        return self.phases[max(bisect_right(self._starts, step), 1) - 1]

    def tokens_after(self, step: int) -> int:
        """Return the tokens of the first ``step`` steps."""
        phase = self.at(step)
        return phase.first_tokens + (step - phase.first_step) * phase.recipe.train.tokens_per_step

    def ends_phase(self, step: int) -> bool:
        """Whether a phase, but not the run, is at its end after ``step`` steps."""
        return any(step == phase.end_step for phase in self.phases[:-1])

    def changes_length(self, step: int) -> bool:
        """Whether step ``step`` (from 0) has another sequence length than the one before it."""
        now = self.at(step)
        before = self.at(max(step - 1, 0))
        return now.recipe.train.sequence_length != before.recipe.train.sequence_length


def recipe_at(recipe: Recipe, step: int) -> Recipe:
    """Return the recipe of the last of ``step`` steps, which a checkpoint was trained with."""
    return Timeline(recipe).at(max(step - 1, 0)).recipe
