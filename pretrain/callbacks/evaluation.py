"""Evaluates saved checkpoints while training goes on.

Callbacks live on rank 0, and a sharded model needs all ranks: so what is evaluated are the whole
fp32 weights of each checkpoint, in one more process. Training neither waits for it nor gives it
memory or collectives, and what is seen is what was saved.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

from pretrain.callbacks.base import Callback, Row
from pretrain.config.recipe import EvaluationConfig
from pretrain.core.plugins import plugin_arguments
from pretrain.core.shipped import TOOLS
from pretrain.evaluation.watch import forget_after

logger = logging.getLogger(__name__)

TOOL = TOOLS / "evaluate.py"
LOG = "evaluation.log"
# What launchers tell ranks, and must not tell a process that is none.
RANK_PREFIXES = (
    "RANK",
    "LOCAL_",
    "WORLD_SIZE",
    "MASTER_",
    "GROUP_",
    "ROLE_",
    "TORCHELASTIC_",
    "SLURM_",
    "PMI",
    "OMPI_",
    "CROSS_",
    "MPI_",
)


def watch_command(run: Path, config: EvaluationConfig, step: int, last_step: int) -> list[str]:
    """The command line that evaluates each new checkpoint of the run, which goes on from ``step``,
    as the recipe's section says.
    """
    command = [
        sys.executable,
        str(TOOL),
        "--watch",
        str(run),
        "--parent",
        str(os.getpid()),
        str(step),
        str(last_step),
        "--device",
        config.device,
    ]
    command += ["--max-new-tokens", str(config.max_new_tokens)]
    options: dict[str, int | str | None] = {
        "--interval-steps": config.interval_steps,
        "--max-windows": config.max_windows,
        "--limit": config.limit,
    }
    options |= {"--tasks": ",".join(config.tasks) or None, "--include-path": config.include_path}
    for name, value in options.items():
        command += [] if value is None else [name, str(value)]
    command += plugin_arguments()
    # As one argument each: a prompt may begin with a dash.
    return [
        *command,
        *(f"--prompt={prompt}" for prompt in config.prompts),
        *(["--heldout"] if config.heldout else []),
    ]


class ContinuousEvaluation(Callback):
    """Starts the process with the training, and ends it with it: finished, after the last
    checkpoint is evaluated; interrupted, at once.

    What was not evaluated when a run was interrupted is evaluated when it goes on.
    """

    def __init__(self, run: Path, config: EvaluationConfig) -> None:
        self.run, self.config = run, config
        self.process: subprocess.Popen[bytes] | None = None
        self.step = self.num_steps = 0

    def on_start(self, step: int, num_steps: int) -> None:
        self.num_steps = num_steps
        self._watch_from(step)

    def on_rollback(self, step: int) -> None:
        self._stop()
        self._watch_from(step)

    def on_step(self, step: int) -> None:
        self.step = step

    def on_early_end(self, step: int) -> None:
        self.num_steps = step

    def on_end(self, summary: Row) -> None:
        if self.process is None:
            return
        try:
            code = self.process.wait(
                timeout=self.config.finish_seconds if self.step == self.num_steps else 0
            )
            if code:
                logger.warning(
                    "the evaluation of checkpoints ended with exit code %d: see %s",
                    code,
                    self.run / LOG,
                )
        except subprocess.TimeoutExpired:
            logger.warning(
                "the evaluation of checkpoints is not at its end: tools/evaluate.py --watch %s"
                " goes on",
                self.run,
            )
            self._stop()

    def _watch_from(self, step: int) -> None:
        self.step = step
        forget_after(self.run, step)
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(RANK_PREFIXES)
        }
        command = watch_command(self.run, self.config, step, self.num_steps)
        with (self.run / LOG).open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
            )

    def _stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait()
