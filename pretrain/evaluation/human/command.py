"""The part of ``tools/evaluate.py`` that writes sheets for raters, and scores them."""

from __future__ import annotations

import argparse
from pathlib import Path

from pretrain.core.cli import write_json
from pretrain.core.errors import ConfigError
from pretrain.evaluation.device import choose_device
from pretrain.evaluation.generation.sampling import Sampling
from pretrain.evaluation.human.report import report
from pretrain.evaluation.human.score import score_study
from pretrain.evaluation.human.study import (
    CRITERIA,
    KEY,
    RATERS,
    SheetOptions,
    make_study,
    read_prompts,
)
from pretrain.evaluation.tasks.suite import WRITING_BATCH


def add_human(parser: argparse.ArgumentParser) -> None:
    """Add the options of a human evaluation; ``--human-score`` is one of the tool's subjects."""
    group = parser.add_argument_group("human evaluation")
    group.add_argument(
        "--human-sheet",
        type=Path,
        metavar="FOLDER",
        help="write blind sheets of generated texts, as HTML and CSV, and the key to them",
    )
    group.add_argument(
        "--human-against",
        type=Path,
        metavar="PATH",
        help="with --human-sheet: pairs with the texts of this model; ratings without it",
    )
    group.add_argument(
        "--human-prompts",
        type=Path,
        metavar="JSONL",
        help='with --human-sheet: a "prompt" a line, in addition to --prompt',
    )
    group.add_argument(
        "--human-raters",
        type=int,
        default=2,
        metavar="N",
        help="with --human-sheet: sheets, each in an order of its own (default: 2)",
    )
    group.add_argument(
        "--human-criteria",
        nargs="+",
        default=list(CRITERIA),
        metavar="NAME",
        help=f"with --human-sheet: what is rated from 1 to 5 (default: {' '.join(CRITERIA)})",
    )
    group.add_argument(
        "--human-question", metavar="TEXT", help="with --human-sheet: what raters are asked"
    )
    group.add_argument(
        "--key", type=Path, metavar="JSON", help="with --human-score: key.json of the study"
    )


def sheet_options(arguments: argparse.Namespace) -> SheetOptions:
    """The study that --human-sheet asks for."""
    if arguments.watch is not None:
        raise ConfigError("--human-sheet needs one --checkpoint, not --watch: give one")
    prompts = list(arguments.prompts)
    if arguments.human_prompts is not None:
        prompts += read_prompts(arguments.human_prompts)
    return SheetOptions(
        arguments.human_sheet,
        prompts,
        arguments.human_against,
        arguments.human_criteria,
        arguments.human_question,
        arguments.human_raters,
        arguments.seed,
    )


def check_human(arguments: argparse.Namespace) -> None:
    """Raises :class:`ConfigError` for options that have nothing to work on."""
    needs = {
        "human_against": "human_sheet",
        "human_prompts": "human_sheet",
        "human_question": "human_sheet",
        "key": "human_score",
    }
    for option, other in needs.items():
        if getattr(arguments, option) is not None and not getattr(arguments, other):
            raise ConfigError(
                f"--{option.replace('_', '-')} belongs to --{other.replace('_', '-')}: add that"
            )
    if arguments.human_score and arguments.key is None:
        raise ConfigError("--human-score needs the study's key: give --key FOLDER/key.json")
    if arguments.human_score and arguments.human_sheet is not None:
        raise ConfigError("--human-score reads what --human-sheet wrote: give one of them")


def asks_for_humans(arguments: argparse.Namespace) -> bool:
    """Whether the command line is about sheets, and not about a measurement."""
    check_human(arguments)
    return bool(arguments.human_score) or arguments.human_sheet is not None


def run_human(arguments: argparse.Namespace, sampling: Sampling, stop: list[str]) -> None:
    """Score filled-in sheets, or write new ones.

    Args:
        sampling: of the texts.
        stop: strings that end a text.
    """
    if arguments.human_score:
        result = score_study(arguments.human_score, arguments.key)
        if arguments.json_path != "-":
            print(report(result))
        write_json(result, arguments.json_path)
        return
    options = sheet_options(arguments)
    key = make_study(
        arguments.checkpoint,
        options,
        choose_device(arguments.device),
        sampling,
        max_new_tokens=arguments.max_new_tokens,
        stop=stop,
        batch_size=arguments.batch_size or WRITING_BATCH,
    )
    if arguments.json_path != "-":
        print(
            f"wrote {len(key.sheets)} sheets of {len(key.items)} items to"
            f" {options.output / RATERS}: give each rater one, and keep {options.output / KEY}"
            " to yourself"
        )
    written = {"study": str(options.output), "sheets": len(key.sheets), "items": len(key.items)}
    write_json(written, arguments.json_path)
