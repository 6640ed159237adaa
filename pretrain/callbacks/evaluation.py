"""Evaluates saved checkpoints while training continues.

Callbacks exist on rank 0 only, and a sharded model needs all ranks. So one more process evaluates
the whole fp32 weights of each checkpoint: training neither waits for it nor gives it memory or
collectives, and what is evaluated is what was saved.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

from pretrain.callbacks.base import Callback, MetricsRecord, Summary
from pretrain.config.recipe import CodeEvaluation, EvaluationConfig
from pretrain.core.plugins import plugin_arguments
from pretrain.core.shipped import TOOLS
from pretrain.evaluation.watch import forget_after

logger = logging.getLogger(__name__)

TOOL = TOOLS / "evaluate.py"
LOG = "evaluation.log"
# What launchers set for ranks. A process that is not a rank must not see it: it would wait for
# the others.
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
    """Return the command line that evaluates each new checkpoint of a run after ``step``."""
    command = [sys.executable, str(TOOL), "--watch", str(run)]
    command += ["--parent", str(os.getpid()), str(step), str(last_step)]
    command += ["--device", config.device]
    command += ["--max-new-tokens", str(config.max_new_tokens)]
    options: dict[str, float | str | None] = {
        "--interval-steps": config.interval_steps,
        "--max-windows": config.max_windows,
        "--limit": config.limit,
        "--tasks": ",".join(config.tasks) or None,
        "--include-path": config.include_path,
    }
    if config.code is not None:
        options |= _code_options(config.code)
    for name, value in options.items():
        if value is not None:
            command += [name, str(value)]
    if config.code is not None and config.code.allow_execution:
        command += ["--allow-code-execution"]
    command += plugin_arguments()
    # "--prompt=..." as one argument: a prompt may begin with a dash.
    command += [f"--prompt={prompt}" for prompt in config.prompts]
    return [*command, "--heldout"] if config.heldout else command


def _code_options(code: CodeEvaluation) -> dict[str, float | str | None]:
    return {
        "--code-problems": code.problems,
        "--num-samples": code.num_samples,
        "--pass-at": ",".join(str(k) for k in code.pass_at),
        "--code-temperature": code.temperature,
        "--code-max-new-tokens": code.max_new_tokens,
        "--program-seconds": code.program_seconds,
        "--program-memory": code.program_memory_mib,
    }


class ContinuousEvaluation(Callback):
    """Starts the evaluating process with the training, and ends it at the training's end.

    After the last step it waits until the last checkpoint is evaluated; if training was
    interrupted, it ends the process at once. The next start then evaluates what is left.
    """

    def __init__(self, run: Path, config: EvaluationConfig) -> None:
        self.run = run
        self.config = config
        self.process: subprocess.Popen[bytes] | None = None
        self.step = 0
        self.num_steps = 0
        self._reported = False

    def on_start(self, step: int, num_steps: int) -> None:
        """Start the process."""
        self.num_steps = num_steps
        self._watch_from(step)

    def on_rollback(self, step: int) -> None:
        """Start the process anew: what it knows of later checkpoints is no longer true."""
        self._stop()
        self._watch_from(step)

    def on_step(self, step: int) -> None:
        """Remember the step."""
        self.step = step

    def on_record(self, record: MetricsRecord) -> None:
        """Report at once if the process has failed: at the end it would be too late."""
        if self.process is not None and (code := self.process.poll()):
            self._report(code)

    def on_early_end(self, step: int) -> None:
        """Take ``step`` for the last one."""
        self.num_steps = step

    def on_end(self, summary: Summary) -> None:
        """Wait for the evaluation of the last checkpoint, if the run is finished."""
        if self.process is None:
            return
        seconds = self.config.finish_seconds if self.step == self.num_steps else 0
        try:
            code = self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            logger.warning(
                "the evaluation of checkpoints is not at its end: "
                "tools/evaluate.py --watch %s continues it",
                self.run,
            )
            self._stop()
            return
        if code:
            self._report(code)

    def _report(self, code: int) -> None:
        if self._reported:
            return
        self._reported = True
        sentence = (
            f"the evaluation of checkpoints ended with exit code {code}: see {self.run / LOG}"
        )
        logger.warning(sentence)
        # tqdm.write keeps the progress bar whole.
        tqdm.write(f"warning: {sentence}", file=sys.stderr)

    def _watch_from(self, step: int) -> None:
        self.step = step
        self._reported = False
        forget_after(self.run, step)
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(RANK_PREFIXES)
        }
        command = watch_command(self.run, self.config, step, self.num_steps)
        with (self.run / LOG).open("ab") as log:
            self.process = subprocess.Popen(
                command,
                # It must not read the terminal of the training.
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
            )

    def _stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait()
