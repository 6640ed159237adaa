"""Which phase each step of a run belongs to, and what was consumed before it: pure functions of the
recipe and the step.

Steps, tokens and samples are counted here and nowhere else. A run without phases is one stage of
the whole recipe.

Sequences of several lengths share one order: it goes over blocks of the run's longest sequence. A
step of B shorter ones reads one window of each of B blocks, and the following steps read the next
windows of the same blocks until they are used up. So a phase takes whole blocks: its tokens are
rounded up to as many steps as read them, longest / own length steps at a time. No token comes twice
before its source's epoch ends, whatever the lengths, if the longest is the same from the first step
on.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from pretrain.config.phases import PhaseConfig
from pretrain.config.recipe import Recipe
from pretrain.config.schedules import PhaseSchedule

SIZES = ("global_batch_size", "micro_batch_size", "sequence_length")


def recipe_in_phase(recipe: Recipe, phase: PhaseConfig) -> Recipe:
    """The recipe as it is during one of its phases: without phases, with what this one changes."""
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
        frozen: patterns of what is not trained.
        first_step, first_tokens, first_block: steps, tokens and blocks before it.
        slices: sequences in a block, and so the steps that read one group of blocks.
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
        """The first step behind it."""
        return self.first_step + self.num_steps

    @property
    def num_tokens(self) -> int:
        return self.num_steps * self.recipe.train.tokens_per_step


class Timeline:
    """The stages of a run, one after the other.

    Attributes:
        block_tokens: the longest sequence of the run.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.block_tokens = (
            max(recipe_in_phase(recipe, phase).train.sequence_length for phase in recipe.phases)
            if recipe.phases
            else 0
        )
        self.block_tokens = self.block_tokens or recipe.train.sequence_length
        self.stages: list[Phase] = []
        step = tokens = block = 0
        rest = recipe.train.train_tokens - sum(phase.tokens or 0 for phase in recipe.phases)
        for number, phase in enumerate(recipe.phases or [None], start=1):
            now = recipe if phase is None else recipe_in_phase(recipe, phase)
            slices = self.block_tokens // now.train.sequence_length
            wanted = rest if phase is None or phase.tokens is None else phase.tokens
            groups = -(-wanted // (now.train.tokens_per_step * slices))
            name, schedule, frozen = (
                ("", None, ())
                if phase is None
                else (phase.name, phase.schedule, tuple(phase.frozen))
            )
            stage = Phase(
                name, number, now, schedule, frozen, step, groups * slices, tokens, block, slices
            )
            self.stages.append(stage)
            step, tokens, block = (
                stage.end_step,
                tokens + stage.num_tokens,
                block + groups * now.train.global_batch_size,
            )
        self.num_steps, self.num_tokens = step, tokens
        self._starts = [stage.first_step for stage in self.stages]

    def at(self, step: int) -> Phase:
        """The stage of step ``step`` (from 0); behind the last one, that one."""
        return self.stages[max(bisect_right(self._starts, step), 1) - 1]

    def tokens_after(self, step: int) -> int:
        """Tokens of the first ``step`` steps."""
        stage = self.at(step)
        return stage.first_tokens + (step - stage.first_step) * stage.recipe.train.tokens_per_step

    def ends_phase(self, step: int) -> bool:
        """Whether a phase, but not the run, is at its end after ``step`` steps."""
        return any(step == stage.end_step for stage in self.stages[:-1])

    def changes_length(self, step: int) -> bool:
        """Whether step ``step`` (from 0) has another sequence length than the one before it."""
        stages = self.at(step), self.at(max(step - 1, 0))
        return stages[0].recipe.train.sequence_length != stages[1].recipe.train.sequence_length


def recipe_at(recipe: Recipe, step: int) -> Recipe:
    """Return the recipe of the last of ``step`` steps: what a checkpoint was trained with."""
    return Timeline(recipe).at(max(step - 1, 0)).recipe
