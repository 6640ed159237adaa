"""A guard: the loss must not be above a limit."""

from typing import ClassVar, Literal

from pretrain.config.guards import StepGuardConfig
from pretrain.guards.detect import StepGuard


class LossLimitConfig(StepGuardConfig):
    """Acts on a step whose loss is above ``nats``."""

    implementation: ClassVar[str] = "my_parts.guard:LossLimit"
    kind: Literal["loss_limit"]
    nats: float


class LossLimit(StepGuard):
    """What the section stands for."""

    def __init__(self, config: LossLimitConfig) -> None:
        self.nats = config.nats

    def look(self, step: int, loss: float, grad_norm: float) -> str | None:
        """Return what is wrong with the step."""
        return f"its loss {loss:.2f} is above {self.nats:g}" if loss > self.nats else None
