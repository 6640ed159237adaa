#!/usr/bin/env python
# PYTHON_ARGCOMPLETE_OK
"""Runs the whole main job with the commands a user would type, and prints a summary.

Stages that are done already are reused, and an interrupted one is resumed.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypedDict, cast

from pretrain.core import startup  # not found? Run `pip install -e .` in the checkout.

startup.prepare()  # before the slow imports

from rich.console import Console
from rich.table import Table

from pretrain.checkpoint.layout import resolve_checkpoint
from pretrain.config.load import load_recipe
from pretrain.config.recipe import Recipe
from pretrain.core import interrupts
from pretrain.core.cli import add_json_option, add_recipe_options, command_parser, write_json
from pretrain.core.errors import PipelineError, run_command
from pretrain.core.files import JsonObject
from pretrain.core.plugins import plugin_arguments
from pretrain.core.shipped import CHECKOUT, DEFAULT_DS_CONFIG, LAUNCHERS, TOOLS, shown
from pretrain.engine.topology import free_port
from pretrain.run.folder import SUMMARY, update_summary

EXAMPLES = """\
  make quickstart
  python tools/quickstart.py --num-accelerators 1 --set parallel.ep_size=1
  python tools/quickstart.py --recipe debug --set parallel.ep_size=2"""
PROMPT = "def read_file(path):"
TITLES = {
    "data": "texts to token shards",
    "train": "pretraining",
    "evaluate": "loss on the validation split, compared with a bigram model",
    "convert": "export for Hugging Face, with its logits compared",
    "generate": "a text from the export",
}
STAGES = tuple(TITLES)
LAUNCHER_PORT = 29500  # the default of the deepspeed launcher
# Whether a stage's result is of work that had been done before.
IsReuse = Callable[[JsonObject], bool]


class StageSummary(TypedDict):
    """What the stages add to the summary of the training.

    Losses are in nats a token. ``seconds_by_stage`` counts all starts of a stage until it was done.
    """

    bad_records: int
    validation_loss: float
    perplexity: float
    bits_per_byte: float
    bigram_loss: float
    better_than_bigram_by: float
    export_max_logit_difference: float
    export_logits_std: float
    export: str
    sample: str
    wall_seconds: float
    seconds_by_stage: dict[str, float]
    reused: list[str]


class QuickstartSummary(StageSummary):
    """The run's summary.json: also what training reports of itself, of which these are printed."""

    train_tokens: int
    steps: int
    tokens_per_second: float
    parameters_total: int
    parameters_active: int
    skipped_steps: int
    skipped_tokens: int
    stopped_early: bool


class StageFailed(PipelineError):
    """A command of the main job ended with an error that it has already printed."""


class Stages:
    """Runs commands one after the other, and keeps their results and times in summary.json.

    A command's standard error stays on the terminal: progress with the time left, warnings, errors.
    Its standard output goes to ``stages/<name>.log``: tables and DeepSpeed's launcher lines.
    """

    def __init__(self, run_folder: Path) -> None:
        self.results = run_folder / "stages"
        self.results.mkdir(parents=True, exist_ok=True)
        self.run_folder = run_folder
        path = run_folder / SUMMARY
        earlier = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        self.seconds: dict[str, float] = earlier.get("seconds_by_stage", {})
        self.reused: list[str] = []

    def result_path(self, name: str) -> Path:
        """The file with the result of a stage."""
        return self.results / f"{name}.json"

    def log_path(self, name: str) -> Path:
        """The file with the standard output of a stage."""
        return self.results / f"{name}.log"

    def run(
        self, name: str, command: list[str], is_reuse: IsReuse, below: Sequence[str] = ()
    ) -> JsonObject:
        """Runs a command that writes its result as JSON; ``below`` is what starts it.

        Its time counts unless the work had been done before.

        Raises:
            StageFailed: with the command's own exit code.
        """
        self._announce(name)
        print(f"$ {shlex.join(command)}", flush=True)
        path, log = self.result_path(name), self.log_path(name)
        path.unlink(missing_ok=True)
        started = time.perf_counter()
        # The stage gets an interrupt too, and may need a while to save.
        with interrupts.deferred(), log.open("ab") as output:
            # Behind what earlier tries have printed: an error names this file.
            output.write(f"$ {shlex.join(command)}\n".encode())
            output.flush()
            finished = subprocess.run(
                [*below, *command, *plugin_arguments(), "--json", str(path)],
                stdout=output,
                check=False,
            )
        elapsed = time.perf_counter() - started
        if finished.returncode != 0:
            # An interrupted stage resumes later: what it has taken so far belongs to its time.
            self._record(name, self.seconds.get(name, 0.0) + elapsed)
            failure = StageFailed(
                f"the stage '{name}' stopped with exit code {finished.returncode}: see above and "
                f"{log}; `make quickstart` resumes from here"
            )
            failure.exit_code = finished.returncode if finished.returncode > 0 else 1
            raise failure
        result: JsonObject = json.loads(path.read_text(encoding="utf-8"))
        if is_reuse(result):
            self.reused.append(name)
            self._record(name, self.seconds.get(name, elapsed))
        else:
            resumed = bool(result.get("resumed_from_step"))
            self._record(name, elapsed + (self.seconds.get(name, 0.0) if resumed else 0.0))
        how = "was done before" if name in self.reused else f"done in {elapsed:.0f} s"
        print(f"{how}; its output: {log}", flush=True)
        return result

    def _announce(self, name: str) -> None:
        print(f"\n[{STAGES.index(name) + 1}/{len(STAGES)}] {name}: {TITLES[name]}", flush=True)

    def reuse(self, name: str, matches: IsReuse) -> JsonObject | None:
        """The stored result of a stage, if it belongs to the checkpoint at hand."""
        path = self.result_path(name)
        if name not in self.seconds or not path.is_file():
            return None
        result: JsonObject = json.loads(path.read_text(encoding="utf-8"))
        if not matches(result):
            return None
        self._announce(name)
        print(f"was done before; its result: {path}", flush=True)
        self.reused.append(name)
        return result

    def _record(self, name: str, seconds: float) -> None:
        self.seconds[name] = round(seconds, 1)
        update_summary(self.run_folder, {"seconds_by_stage": self.seconds})


def default_ranks() -> int:
    """Two processes on CPUs; on GPUs one for each, but at most two, as the model is small."""
    # Imported here: the command line is checked without waiting for it.
    import torch

    return min(2, torch.cuda.device_count()) if torch.cuda.is_available() else 2


def other_port() -> list[str]:
    """An option for the launcher if its default port is taken, by another run for example."""
    with socket.socket() as probe:
        taken = probe.connect_ex(("127.0.0.1", LAUNCHER_PORT)) == 0
    return ["--master_port", str(free_port())] if taken else []


def parse_arguments() -> argparse.Namespace:
    """The command's options."""
    parser = command_parser(__doc__ or "", EXAMPLES)
    add_recipe_options(parser, default="quickstart")
    parser.add_argument(
        "--num-accelerators",
        type=int,
        metavar="N",
        help="processes (default: 2, or 1 with a single GPU)",
    )
    parser.add_argument("--ds_config", default=DEFAULT_DS_CONFIG, metavar="NAME|PATH")
    parser.add_argument("--prompt", default=PROMPT)
    add_json_option(parser)
    return parser.parse_args()


def run_stages(
    options: argparse.Namespace, recipe: Recipe, stages: Stages
) -> dict[str, JsonObject]:
    """Runs the five commands of the main job in order; returns their results by name."""
    settings = [part for override in options.overrides for part in ("--set", override)]
    chosen = ["--recipe", options.recipe, *settings]
    build = ["python", shown(TOOLS / "preprocess_data.py"), *chosen]
    data = stages.run("data", build, lambda result: bool(result["reused"]))
    launch = [
        "deepspeed",
        *other_port(),
        "--num_accelerators",
        str(options.num_accelerators),
        shown(LAUNCHERS / "pretrain.py"),
        "--ds_config",
        options.ds_config,
        *chosen,
    ]
    # The ranks of a bare launcher would outlive this process and the launcher.
    supervised = [sys.executable, str(LAUNCHERS / "supervise.py"), "--parent", str(os.getpid())]
    train = stages.run(
        "train", launch, lambda result: bool(result["done_already"]), below=supervised
    )
    return {"data": data, "train": train} | run_checkpoint_stages(options.prompt, recipe, stages)


def run_checkpoint_stages(prompt: str, recipe: Recipe, stages: Stages) -> dict[str, JsonObject]:
    """Evaluates and exports the newest checkpoint, and continues the prompt with the export."""
    latest = str(Path(recipe.output_path) / "checkpoints" / "latest")
    exported = Path(recipe.output_path) / "hf"
    checkpoint = str(resolve_checkpoint(latest))

    def is_same_checkpoint(result: JsonObject) -> bool:
        # A training that took steps may have written another checkpoint of the same name.
        return result.get("checkpoint") == checkpoint and "train" in stages.reused

    evaluate = ["python", shown(TOOLS / "evaluate.py"), "--checkpoint", latest]
    scores = stages.reuse("evaluate", is_same_checkpoint) or stages.run(
        "evaluate", evaluate, lambda _: False
    )
    convert = [
        "python",
        shown(TOOLS / "convert_checkpoint.py"),
        "--checkpoint",
        latest,
        "--to",
        "hf",
        "--output",
        str(exported),
        "--overwrite",
    ]
    is_exported = (exported / "config.json").is_file()
    export = (stages.reuse("convert", is_same_checkpoint) if is_exported else None) or stages.run(
        "convert", convert, lambda _: False
    )
    generate = [
        "python",
        shown(TOOLS / "generate.py"),
        "--model",
        str(exported),
        "--prompt",
        prompt,
    ]

    def is_same_prompt(result: JsonObject) -> bool:
        prompts = [text["prompt"] for text in result.get("samples", [])]
        return prompts == [prompt] and "convert" in stages.reused

    text = stages.reuse("generate", is_same_prompt) or stages.run(
        "generate", generate, lambda _: False
    )
    return {"evaluate": scores, "convert": export, "generate": text}


def summarize(results: dict[str, JsonObject], stages: Stages) -> JsonObject:
    """The result of the training, with what the other stages add to it."""
    scores = results["evaluate"]
    export = results["convert"]
    bigram = scores["bigram"]
    sample = results["generate"]["samples"][0]
    sources = results["data"]["sources"].values()
    added: StageSummary = {
        "bad_records": sum(sum(source["bad"].values()) for source in sources),
        "validation_loss": scores["loss"],
        "perplexity": scores["perplexity"],
        "bits_per_byte": scores["bits_per_byte"],
        "bigram_loss": bigram["loss"],
        "better_than_bigram_by": scores["better_than_bigram_by"],
        "export_max_logit_difference": export["parity"]["max_difference"],
        "export_logits_std": export["parity"]["logits_std"],
        "export": export["output"],
        "sample": sample["prompt"] + sample["text"],
        "wall_seconds": round(sum(stages.seconds.values()), 1),
        "seconds_by_stage": stages.seconds,
        "reused": stages.reused,
    }
    return {**results["train"], **added}


def _notices(summary: QuickstartSummary) -> dict[str, str]:
    """Rows of the table for what a reader of the summary must not miss."""
    rows = {}
    if summary["bad_records"]:
        rows["bad records"] = f"{summary['bad_records']:,}, see stages/data.log"
    if summary["skipped_steps"]:
        rows["skipped steps"] = (
            f"{summary['skipped_steps']:,} ({summary['skipped_tokens']:,} tokens were not learned "
            "from), see stages/train.log"
        )
    if summary["stopped_early"]:
        rows["stopped early"] = "the validation loss did not fall any more"
    return rows


def print_summary(summary: QuickstartSummary, recipe: Recipe) -> None:
    """Prints the summary as a table, and the text that the model has written."""
    folder = recipe.output_path
    stage_times = ", ".join(
        f"{name} {seconds:.0f}" for name, seconds in summary["seconds_by_stage"].items()
    )
    table = Table("what", "value", title=f"{recipe.name}: the main job", show_lines=False)
    rows = {
        "tokens": (
            f"{summary['train_tokens']:,} in {summary['steps']:,} steps,"
            f" {summary['tokens_per_second']:,.0f} tokens/s"
        ),
        "parameters": (
            f"{summary['parameters_total']:,} total, {summary['parameters_active']:,} active"
        ),
        "validation loss": (
            f"{summary['validation_loss']:.4f} nats a token (perplexity"
            f" {summary['perplexity']:.2f})"
        ),
        "bits a byte": f"{summary['bits_per_byte']:.4f}",
        "Kneser-Ney bigram": (
            f"{summary['bigram_loss']:.4f} nats a token: the model is"
            f" {summary['better_than_bigram_by']:.4f} better"
        ),
        "export": (
            f"max logit difference {summary['export_max_logit_difference']:.1e} (standard deviation"
            f" {summary['export_logits_std']:.2f})"
        ),
        "wall time": f"{summary['wall_seconds']:.0f} s: {stage_times}",
        "reused": ", ".join(summary["reused"]) or "nothing",
        **_notices(summary),
        "where": (
            f"{recipe.data_path} (shards), {folder}/checkpoints, {folder}/hf,"
            f" {folder}/training_curves.png, {folder}/summary.json"
        ),
        "logs": f"{folder}/log.txt (training), {folder}/stages/*.log",
        "TensorBoard": f"tensorboard --logdir {folder}/tensorboard",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console = Console()
    console.print(table)
    console.print("[bold]sample[/bold]")
    console.print(summary["sample"], markup=False, highlight=False)


def main() -> int:
    """The command; returns its exit code."""
    options = parse_arguments()
    options.num_accelerators = options.num_accelerators or default_ranks()
    recipe = load_recipe(options.recipe, options.overrides)
    parallel = recipe.parallel
    if options.num_accelerators == 1 and parallel.fewest_ranks > 1:
        options.overrides += ["parallel={ep_size: 1, sp_size: 1, tp_size: 1}"]
        recipe = load_recipe(options.recipe, options.overrides)
    if CHECKOUT is not None:  # its data/ and runs/ are where the documentation looks for them
        os.chdir(CHECKOUT)
    # python and deepspeed are those of this environment, also if it is not active.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    stages = Stages(Path(recipe.output_path))
    values = summarize(run_stages(options, recipe, stages), stages)
    summary = update_summary(Path(recipe.output_path), values)
    if options.json_path != "-":
        print_summary(cast(QuickstartSummary, summary), recipe)
    write_json(summary, options.json_path)
    return 0


command = partial(run_command, main)  # moe-quickstart

if __name__ == "__main__":
    command()
