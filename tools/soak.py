#!/usr/bin/env python
# PYTHON_ARGCOMPLETE_OK
"""Kills a run at random moments, starts it again, and compares it with an uninterrupted run.

The same command is started until it ends: nothing is repaired by hand in between.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

from pretrain.core import startup  # not found? Run `pip install -e .` in the checkout.

startup.prepare()  # before the slow imports

from rich.console import Console

from pretrain.config.load import load_recipe
from pretrain.core.cli import add_recipe_options, command_parser, write_json
from pretrain.core.errors import DONE, ConfigError, PipelineError, run_command
from pretrain.core.files import only_writer
from pretrain.core.plugins import plugin_arguments
from pretrain.core.progress import Stage
from pretrain.core.shipped import TOOLS
from pretrain.soak.attempt import Layout
from pretrain.soak.drill import AttemptResult, Drill, Settings
from pretrain.soak.report import checks_of, draw, report_of, table_of

EXAMPLES = """\
  make soak
  python tools/soak.py --kills 3
  python tools/soak.py --kills 20 --recipe debug --topologies ranks=2 ranks=1,zero=2 \\
      --output soak.json
exit codes: 0 everything held; 1 something did not, or the run itself failed; 2 usage"""
STEPS_PER_KILL = 4


class DrillFailed(PipelineError):
    """Something that must hold did not."""


def parse_arguments() -> argparse.Namespace:
    """The command's options."""
    parser = command_parser(__doc__ or "", EXAMPLES)
    add_recipe_options(parser, default="debug")
    parser.add_argument(
        "--kills", type=int, default=100, metavar="N", help="(default: %(default)s)"
    )
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--topologies",
        nargs="+",
        metavar="ranks=N[,ep_size=N][,sp_size=N][,tp_size=N][,zero=N]",
        help="instead of --ranks: restarts take the next one each, cyclically",
    )
    parser.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help=f"of the run (default: {STEPS_PER_KILL} a kill, at least 12)",
    )
    parser.add_argument(
        "--save-every", type=int, default=3, metavar="N", help="steps (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the kills")
    parser.add_argument(
        "--folder",
        default="runs/soak",
        metavar="PATH",
        help="for both runs and what they print (default: %(default)s)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="delete the drill that is in --folder"
    )
    parser.add_argument(
        "--output",
        metavar="PATH",
        help="the report, JSON; the plot is next to it (default: report.json in --folder)",
    )
    parser.add_argument(
        "--orphan-seconds",
        type=float,
        default=60.0,
        metavar="S",
        help="how long the processes of a killed run may need to end (default: %(default)g)",
    )
    return parser.parse_args()


def settings_of(options: argparse.Namespace) -> Settings:
    """The drill that the options describe.

    Raises:
        ConfigError: if a number is too small.
    """
    for name in ("kills", "ranks", "save_every"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(options, name)}: give 1+")
    steps = options.steps or max(12, STEPS_PER_KILL * options.kills)
    if steps < options.kills:
        raise ConfigError(f"--steps {steps} is less than --kills {options.kills}: give more steps")
    train = load_recipe(options.recipe, options.overrides).train
    tokens = steps * train.global_batch_size * train.sequence_length
    layouts = [Layout.parse(text) for text in options.topologies or [f"ranks={options.ranks}"]]
    return Settings(
        recipe=options.recipe,
        folder=Path(options.folder),
        kills=options.kills,
        steps=steps,
        layouts=tuple(layouts),
        settings=(
            f"checkpoint.interval_steps={options.save_every}",
            "logging.interval_steps=1",
            *options.overrides,
            f"train.train_tokens={tokens}",
            "train.epochs=null",
        ),
        seed=options.seed,
        orphan_seconds=options.orphan_seconds,
    )


def prepare_data(options: argparse.Namespace) -> None:
    """Build the recipe's data if they are not there.

    Raises:
        DrillFailed: if that fails; the command has said why.
    """
    command = [sys.executable, str(TOOLS / "preprocess_data.py"), "--recipe", options.recipe]
    command += [part for setting in options.overrides for part in ("--set", setting)]
    done = subprocess.run([*command, *plugin_arguments()], stdout=subprocess.DEVNULL, check=False)
    if done.returncode != DONE:
        raise DrillFailed(f"building the data ended with exit code {done.returncode}, see above")


def run_drill(settings: Settings) -> Drill:
    """Run both runs, with progress on standard error."""
    with Stage("uninterrupted run", show=True):
        reference = Drill(settings)
        reference.run_reference()
    # A start after the last kill takes the run to its end.
    with Stage("killed run", show=True, total=settings.kills + 1, unit="start") as stage:

        def advance(result: AttemptResult) -> None:
            stage.advance(1)

        drill = Drill(settings, advance)
        drill.reference_seconds = reference.reference_seconds
        drill.run_killed()
    return drill


def main() -> None:
    """The command.

    Raises:
        DrillFailed: if a check does not hold.
    """
    options = parse_arguments()
    settings = settings_of(options)
    with only_writer(settings.folder, "choose another --folder"):
        for run in (settings.reference, settings.killed):
            if run.exists() and not options.overwrite:
                raise ConfigError(
                    f"{settings.folder} holds a drill: add --overwrite, or choose another --folder"
                )
            shutil.rmtree(run, ignore_errors=True)
            (settings.folder / f"{run.name}.txt").unlink(missing_ok=True)
        prepare_data(options)
        drill = run_drill(settings)
    checks = checks_of(drill)
    report = report_of(drill, checks)
    output = Path(options.output or settings.folder / "report.json")
    write_json(report, str(output))
    draw(drill, output.with_suffix(".png"))
    Console(width=None if sys.stdout.isatty() else 120).print(table_of(report))
    print(f"report: {output}, plot: {output.with_suffix('.png')}")
    if failed := [check for check in checks if not check.holds]:
        raise DrillFailed(
            f"the drill failed: {failed[0].name}: {failed[0].detail}; both runs are in "
            f"{settings.folder}"
        )


command = partial(run_command, main)  # moe-soak

if __name__ == "__main__":
    command()
