"""Where parts of a step that DeepSpeed does not know are hooked into it."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.model.decoder import RouterTotals


@dataclass(frozen=True)
class Update:
    """How the update of a step went, the same on every rank except for ``router``.

    Attributes:
        grad_norm: L2 norm over the whole model before clipping.
        applied: whether weights were updated; a skipped step must leave everything as it was.
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
        """The last backward pass is done and DeepSpeed has reduced its gradients.

        Its update comes next.
        """

    def after_update(self, update: Update) -> None:
        """DeepSpeed has updated its parameters, or skipped them."""
