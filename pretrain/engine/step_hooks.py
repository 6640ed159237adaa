"""The interface by which parts that DeepSpeed does not know take part in a step."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.model.decoder import RouterTotals


@dataclass(frozen=True)
class Update:
    """The outcome of a step's update, the same on every rank except for ``router``.

    Attributes:
        grad_norm: L2 norm over the whole model before clipping.
        applied: whether weights were updated; a skipped step must change nothing.
        learning_rate_factor: share of the peak learning rates.
        balance_rate: how far balancing biases move.
        router: sums over this rank's micro batches; None for a dense model.
    """

    grad_norm: float
    applied: bool
    learning_rate_factor: float
    balance_rate: float
    router: RouterTotals | None


class StepHook:
    """A part of every training step.

    Hooks run in the engine's order, and every rank calls them alike.
    """

    def before_update(self) -> None:
        """Runs after the last backward pass, when DeepSpeed has reduced its gradients.

        DeepSpeed's update comes next.
        """

    def after_update(self, update: Update) -> None:
        """Runs after DeepSpeed has updated its parameters, or skipped them."""
