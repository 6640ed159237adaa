"""The ``guards`` section: what a run does when its losses, gradients or data go wrong.

Each guard names the step, the batch and the documents in the log, on the terminal and in
``incidents.jsonl``, and then does what ``action`` says, on every rank alike:

``warn``      reports it and continues.
``skip``      leaves weights and optimizer as they are. The step keeps its number: schedule, data
              order, checkpoints and validations follow it, so that a run is the same function of
              its step with and without it (as in OLMo's SkipStepOptimizer, OLMo et al. 2024). It is
              counted.
``rollback``  goes back to the newest checkpoint before it and passes over the data in between
              (PaLM: Chowdhery et al. 2022, 5.1).
``stop``      ends the run with exit code 6; the last checkpoint is as it was.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pretrain.core.registry import Component, OneOf
from pretrain.core.section import NonNegative, Positive, Section

Above = Annotated[float, Field(gt=0)]
# Blocks of steps that the window of LossTrendGuard consists of.
TREND_BLOCKS = 20
Action = Literal["warn", "skip", "rollback", "stop"]


class NonFiniteGuard(Section):
    """A loss or a gradient that is not finite. Its update never happens, whatever the action."""

    action: Literal["skip", "rollback", "stop"] = "skip"


class SpikeGuard(Section):
    """A loss far above those of the last steps.

    That is: more than ``deviations`` robust standard deviations (1.4826 times the median absolute
    deviation) above their median, and more than ``min_rise``. While the loss still falls steeply,
    its fall counts as deviation.

    If it never refuses an update (``warn``), it looks at the losses that are logged anyway; else it
    costs one small all-reduce a step.
    """

    action: Action = "warn"
    window_steps: Annotated[int, Field(ge=16)] = Field(
        128, description="it is silent for the first quarter of them, and for 16 at least"
    )
    deviations: Above = 10.0
    min_rise: Above = Field(0.5, description="nats a token")
    in_a_row: Positive = Field(
        1, description="such steps until the action is taken; those before are only reported"
    )


class GradNormGuard(Section):
    """A gradient norm above ``max``, or far above those of the last steps, by their logarithms."""

    action: Action = "warn"
    max: Above | None = Field(None, description="of the norm before clipping")
    window_steps: Annotated[int, Field(ge=16)] = 128
    deviations: Above | None = Field(
        None,
        description=(
            "robust standard deviations, of at least 0.01, of the norm's logarithm; clean "
            "runs of small batches have reached 16"
        ),
    )
    in_a_row: Positive = 1

    @model_validator(mode="after")
    def _has_a_limit(self) -> GradNormGuard:
        if self.max is None and self.deviations is None:
            raise ValueError("it needs a limit: set max, deviations, or both")
        return self


class LossTrendGuard(Section):
    """A training loss that rises slowly, over thousands of steps, without any spike.

    That is: over a window's twenty blocks of steps, the medians of the losses rise almost without
    exception (Kendall's tau of at least 0.75), and their line (Theil and Sen) by ``min_rise``. It
    decides at the end of each block.
    """

    action: Literal["warn", "rollback", "stop"] = "warn"
    window_steps: Annotated[int, Field(ge=100, multiple_of=TREND_BLOCKS)] = Field(
        5000, description="it is silent for the first of them; a multiple of 20"
    )
    min_rise: Above = Field(0.2, description="nats a token, over a window")
    in_a_row: Positive = Field(
        1, description="decisions, each a twentieth of a window later, until the action is taken"
    )


class SustainedGradNormGuard(Section):
    """Gradient norms that stay high: the median of a window of steps is above ``max``."""

    action: Literal["warn", "rollback", "stop"] = "warn"
    max: Above = Field(10.0, description="of the median of the norms before clipping")
    window_steps: Annotated[int, Field(ge=16)] = Field(
        500, description="each window decides once, at its end"
    )
    in_a_row: Positive = Field(1, description="such windows until the action is taken")


class ValidationGapGuard(Section):
    """A validation loss far above the last training loss.

    The data is repeated too often then, or the splits differ.
    """

    action: Literal["warn", "stop"] = "warn"
    nats: Above = Field(1.0, description="nats a token between them")


class StalledDataGuard(Section):
    """A batch that does not come. The rank that waits reports it, while it waits."""

    warn_seconds: Above = 60.0
    stop_seconds: Above | None = Field(
        None, description="ends the run with exit code 3; by default it waits for ever"
    )


class EarlyStopping(Section):
    """Ends a run with exit code 0 once the validation loss no longer falls.

    The end is that of any run: validation over the whole split, and a last checkpoint.
    """

    patience: Positive = Field(description="validations in a row without a new best")
    min_delta: Annotated[float, Field(ge=0)] = Field(
        0.0, description="nats a token below the best that count as a new best"
    )


class Rollback(Section):
    """How ``action: rollback`` goes back."""

    max_times: Positive = Field(3, description="of a run; then it stops")
    skip_steps: NonNegative = Field(
        100, description="steps' worth of data behind the incident that are passed over too"
    )
    learning_rate_factor: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0,
        description=(
            "each rollback multiplies the learning rate by it, from the checkpoint that the run "
            "went back to until its end"
        ),
    )


class StepGuardConfig(Component):
    """A guard of a plugin, which sees each step.

    ``implementation`` is called with this section and returns a ``StepGuard``.
    """

    action: Action = "warn"
    in_a_row: Positive = Field(1, description="such steps until the action is taken")


class GuardConfig(Section):
    """What watches over a run; ``null`` switches a guard off."""

    # Never null: an update of NaN would end the run for good.
    non_finite: NonFiniteGuard = NonFiniteGuard()
    spike: SpikeGuard | None = SpikeGuard()
    grad_norm: GradNormGuard | None = None
    loss_trend: LossTrendGuard | None = None
    sustained_grad_norm: SustainedGradNormGuard | None = None
    validation_gap: ValidationGapGuard | None = ValidationGapGuard()
    stalled_data: StalledDataGuard | None = StalledDataGuard()
    early_stopping: EarlyStopping | None = None
    more: list[Annotated[StepGuardConfig, OneOf()]] = Field(
        [], description="guards of plugins; each kind at most once"
    )
    rollback: Rollback = Rollback()
    max_skipped_in_a_row: Positive = Field(
        10, description="for any reason but a loss scale of fp16 that falls; then the run stops"
    )

    @model_validator(mode="after")
    def _each_kind_once(self) -> GuardConfig:
        # Checkpoints and incidents name a guard by its kind.
        kinds = [guard.kind for guard in self.more]
        if len(set(kinds)) < len(kinds):
            raise ValueError("guards.more has a kind twice, whose states would have one name")
        if built_in := sorted(set(kinds) & set(GuardConfig.model_fields)):
            raise ValueError(f"guards.more has the name of a built-in guard: '{built_in[0]}'")
        return self
