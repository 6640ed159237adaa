"""Options that ``tools/sweep.py`` and ``tools/run_ablations.py`` share."""

from __future__ import annotations

import argparse
from pathlib import Path

from pretrain.core.cli import add_json_option

EXIT_CODES = """
The same command again, or --output alone, resumes a sweep: finished runs are not started again,
interrupted ones resume from their checkpoints. The same command with more seeds, values of an axis
or trials adds runs to the existing ones.

exit codes: 0 every run finished, 2 usage, a point that cannot run, or another sweep's folder,
3 data, 5 disk, 75 interrupted and saved; if runs failed, the exit code of the first of them"""


def add_sweep_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that both commands take.

    Those of ``command.DESIGN_OPTIONS`` have the default None: whether one was given can be seen.
    """
    parser.add_argument(
        "--output",
        "--output-dir",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="runs, records and report; alone: resume the sweep in it",
    )
    _add_run_options(parser)
    _add_execution_options(parser)
    add_json_option(parser)


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    """Options that every run of the sweep has in common."""
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        metavar="A.B=C",
        help="override a field in every run; may be repeated",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help="tokens of each run (default: the recipe's train.train_tokens)",
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", metavar="N", help="run every point with each of these seeds"
    )
    parser.add_argument(
        "--ranks",
        "--gpus",
        type=int,
        metavar="N",
        help="processes of a run, one a GPU; above 1 by the deepspeed launcher (default: 1)",
    )
    parser.add_argument(
        "--ds_config",
        "--ds-config",
        metavar="NAME|PATH",
        help=(
            "DeepSpeed's JSON, for every run: a file in ds_configs/ without .json, or a path"
            " (default: zero1)"
        ),
    )


def _add_execution_options(parser: argparse.ArgumentParser) -> None:
    """Options of how the runs are started; they may differ from one start to the next."""
    parser.add_argument(
        "--slots",
        type=int,
        metavar="N",
        help="runs at once (default: what the GPUs allow, 1 on CPUs)",
    )
    parser.add_argument(
        "--keep-going",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="start other runs after one has failed",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="only continue what is in the folder: without it, the same command begins or continues",
    )
    parser.add_argument("--retry-failed", action="store_true", help="start failed runs once more")
    parser.add_argument(
        "--skip-invalid",
        action="store_true",
        default=None,
        help="leave out points that a rule refuses, instead of starting nothing",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="list the points, start and write nothing"
    )
    parser.add_argument(
        "--slurm",
        action="store_true",
        help="write a batch script with one job of an array for each run, and start nothing",
    )
    parser.add_argument(
        "--point",
        type=int,
        metavar="N",
        help="with --output alone: only run number N (from 0), as a job of an array does",
    )
    parser.add_argument(
        "--report",
        action="store_true",
        help="with --output alone: report what has finished, and start nothing",
    )
