"""A callback: a line a step in a file of the run's folder."""

from typing import ClassVar, Literal

from pretrain.callbacks.base import Callback, CallbackRun
from pretrain.config.callbacks import CallbackConfig


class StepLineConfig(CallbackConfig):
    """Writes a line a step."""

    implementation: ClassVar[str] = "my_parts.callback:StepLine"
    kind: Literal["step_line"]
    text: str = "step"


class StepLine(Callback):
    """What the section stands for."""

    def __init__(self, config: StepLineConfig, run: CallbackRun) -> None:
        self.text = config.text
        self.path = run.folder / "steps.txt"

    def on_step(self, step: int) -> None:
        """Append the step that is done."""
        with self.path.open("a") as stream:
            stream.write(f"{self.text} {step}\n")
