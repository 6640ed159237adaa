"""A tiny project (texts, shards, recipe) and ways to start real runs of it: with a launcher, or
inside the test's own process.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

import pretrain.train
from data_pipeline.preprocess.coordinator import build
from data_pipeline.preprocess.workspace import Output
from pretrain.config.load import load_recipe
from pretrain.core.signals import StopRequest
from pretrain.engine.ds_config import read_ds_config
from pretrain.engine.topology import free_port
from pretrain.run.arguments import parse_arguments
from pretrain.run.build import build_run, build_trainer, check_data, resolve_run
from pretrain.training.trainer import Trainer
from tests.support.fork_server import ForkedProgram
from tests.support.paths import LAUNCHERS

SCRIPT = LAUNCHERS / "pretrain.py"
# What a launcher sets for its ranks: a test must not pass on what it got from an earlier run inside
# its own process.
RANK_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "CROSS_RANK",
    "CROSS_SIZE",
)
WORDS = (
    "the router sends each token to two experts and every expert learns another part of what words"
    " mean".split()
)
STEP_TOKENS = 256
RECIPE = """\
name: tiny
seed: 7
data: {path: DATA, source: {kind: text, input: ["TEXTS/*.txt"]}, tokenizer: {kind: train_bpe, vocab_size: 300}, validation_share: 0.2}
model:
  hidden_size: 32
  num_hidden_layers: 2
  max_position_embeddings: 64
  attention: {kind: gqa, num_attention_heads: 4, num_key_value_heads: 2, head_dim: 8, qk_norm: head}
  moe: {kind: dropless, num_experts: 4, top_k: 2, moe_intermediate_size: 16}
train: {sequence_length: 32, micro_batch_size: 2, global_batch_size: 8, train_tokens: 1280, precision: fp32}
optimizer: {kind: adamw, learning_rate: 3.0e-3}
schedule: {kind: constant, warmup_steps: 2}
checkpoint: {interval_steps: 3, keep_last: 2}
validation: {interval_steps: 2, max_windows: 8}
logging: {interval_steps: 1, tensorboard: false}
"""


@dataclass(frozen=True)
class Tiny:
    """A folder with ``data/``, ``recipe.yaml`` and a ds_config for each ZeRO stage; 256 tokens are
    one step.
    """

    folder: Path
    recipe: Path
    data: Path

    def arguments(
        self, run: Path, *overrides: str, steps: int = 5, zero: int | None = 1
    ) -> list[str]:
        """The training command's options for a run in the folder ``run``; without ``zero`` its own
        ds_config.
        """
        settings = [f"run_path={run}", f"train.train_tokens={steps * STEP_TOKENS}", *overrides]
        ds_config = [] if zero is None else ["--ds_config", str(self.folder / f"zero{zero}.json")]
        return [
            "--recipe",
            str(self.recipe),
            *ds_config,
            *(part for setting in settings for part in ("--set", setting)),
        ]


def make_tiny(folder: Path) -> Tiny:
    source = random.Random(0)
    (folder / "texts").mkdir()
    for number in range(30):
        (folder / "texts" / f"{number}.txt").write_text(" ".join(source.choices(WORDS, k=500)))
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        RECIPE.replace("DATA", str(folder / "data")).replace("TEXTS", str(folder / "texts"))
    )
    build(load_recipe(str(recipe)).data, Output(folder / "data"))
    for stage in range(4):
        (folder / f"zero{stage}.json").write_text(
            json.dumps({"zero_optimization": {"stage": stage}})
        )
    return Tiny(folder, recipe, folder / "data")


def curve(run: Path) -> list[dict[str, Any]]:
    """Every row of a run's metrics.jsonl without what the clock measured."""
    clock = ("tokens_per_second", "seconds", "stall_seconds", "mfu")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in row.items() if name not in clock}
        for row in rows
        if row["kind"] != "timing"
    ]


class Started:
    """A command with all processes below it, found by a mark in their environment even when their
    parent is gone.

    ``python SCRIPT ...`` is forked from a process that has imported torch and DeepSpeed, but for
    ``new_interpreter`` or ``preexec``; a launcher is started as it is.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        folder: Path,
        variables: Mapping[str, str] | None = None,
        preexec: Callable[[], None] | None = None,
        new_interpreter: bool = False,
    ) -> None:
        self.mark = uuid.uuid4().hex
        inherited = {
            name: value for name, value in os.environ.items() if name not in RANK_VARIABLES
        }
        path = f"{Path(sys.executable).parent}{os.pathsep}{inherited['PATH']}"
        own = {
            "PATH": path,
            "VIRTUAL_ENV": sys.prefix,
            "OMP_NUM_THREADS": "1",
            "MASTER_PORT": str(free_port()),
            "TEST_RUN_MARK": self.mark,
        }
        words, environment = [str(part) for part in command], inherited | own
        environment |= dict(variables or {})
        self.stdout = self.stderr = ""
        self.process: subprocess.Popen[str] | ForkedProgram
        self._forked: psutil.Process | None = None
        is_script = words[0] == sys.executable and words[1].endswith(".py")
        if is_script and preexec is None and not new_interpreter:
            self.process = ForkedProgram(words, folder, environment)
            with contextlib.suppress(psutil.NoSuchProcess):
                self._forked = psutil.Process(self.process.pid)
            return
        self.process = subprocess.Popen(
            words,
            cwd=folder,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=preexec,
        )

    def wait(self) -> int:
        """The exit code; what was printed is in ``stdout`` and ``stderr``.

        Kills everything after five minutes.
        """
        try:
            self.stdout, self.stderr = self.process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            for survivor in self.alive():
                survivor.kill()
            self.stdout, self.stderr = self.process.communicate()
            pytest.fail(f"still running after 300 s: {self.stdout}{self.stderr}")
        return self.process.returncode

    def alive(self) -> list[psutil.Process]:
        """Every process of this command that still runs, wherever it hangs in the process tree."""
        found = []
        # A fork shows the environment of its server, not its own.
        if self._forked is not None and self._forked.is_running():
            found = [self._forked, *self._forked.children(recursive=True)]
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if (
                    process.environ().get("TEST_RUN_MARK") == self.mark
                    and process.status() != psutil.STATUS_ZOMBIE
                ):
                    found.append(process)
        return found

    def survivors(self) -> list[psutil.Process]:
        """Those that do not end within half a minute after the command has."""
        return psutil.wait_procs(self.alive(), timeout=30)[1]

    def rank(self, number: int) -> psutil.Process:
        """The process of one rank, in the order in which the launcher started them."""
        ranks = [
            process
            for process in self.alive()
            if process.cmdline()[1:] and any(str(SCRIPT) == part for part in process.cmdline()[1:5])
        ]
        return sorted(ranks, key=lambda process: process.pid)[number]


def start_ranks(
    arguments: Sequence[str | Path],
    folder: Path,
    variables: Mapping[str, str] | None = None,
    world_size: int = 2,
) -> list[Started]:
    """Ranks of the training command from nothing but their environment: no launcher takes its
    seconds, and none ends the others when one dies.
    """
    shared = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(free_port()), **(variables or {})}
    return [
        Started(
            [sys.executable, SCRIPT, *arguments],
            folder,
            shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(world_size)
    ]


def wait_for_step(run: Path, step: int, started: Started) -> None:
    """Returns as soon as the run's metrics.jsonl has a row of that step."""
    deadline = time.monotonic() + 280
    while time.monotonic() < deadline and started.process.poll() is None:
        rows = (
            (run / "metrics.jsonl").read_text().splitlines()
            if (run / "metrics.jsonl").is_file()
            else []
        )
        if len(rows) > 1 and json.loads(rows[-2])["step"] >= step:
            return
        time.sleep(0.005)
    pytest.fail(
        f"step {step} was not reached, exit code {started.process.poll()}:"
        f" {started.process.communicate()}"
    )


@contextlib.contextmanager
def own_process() -> Iterator[None]:
    """Makes :func:`pretrain.train.main` callable again and again in this process, and puts back
    what it changes of it.

    DeepSpeed cannot leave its process group and join another one, so the first run's group stays.
    """
    root, environment = logging.getLogger(), dict(os.environ)
    handlers, level = root.handlers[:], root.level
    signals = {
        number: signal.getsignal(number)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain.train, "disconnect", lambda: None)
        try:
            yield
        finally:
            root.handlers[:], root.level = handlers, level
            os.environ.clear()
            os.environ.update(environment)
            for number, handler in signals.items():
                signal.signal(number, handler)


def make_trainer(tiny: Tiny, run: Path, *overrides: str, zero: int, steps: int = 5) -> Trainer:
    """The trainer that the command would build for one rank, to look inside; call it inside
    :func:`own_process`.
    """
    options = parse_arguments(tiny.arguments(run, *overrides, steps=steps, zero=zero))
    recipe = load_recipe(options.recipe, options.overrides)
    resolved = resolve_run(recipe, read_ds_config(options.ds_config), options.ds_config)
    return build_trainer(build_run(resolved, None), StopRequest(), check_data(resolved))
