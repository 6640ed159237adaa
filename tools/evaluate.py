#!/usr/bin/env python
# PYTHON_ARGCOMPLETE_OK
"""Evaluates a checkpoint or a Hugging Face folder on held-out text, tasks, references or code.

Without a choice, on held-out text.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path

# Python searches a script's own folder first, in which this file hides the package "evaluate" that
# tasks of lm-evaluation-harness import. With -P it does not.
if __name__ == "__main__" and not sys.flags.safe_path:
    os.execv(sys.executable, [sys.executable, "-P", *sys.orig_argv[1:]])

from pretrain.core import startup  # not found? Run `pip install -e .` in the checkout.

startup.prepare()  # before the slow imports

from data_pipeline.shards.split import SPLITS
from pretrain.checkpoint.layout import read_state, resolve_checkpoint
from pretrain.checkpoint.weights_only import is_weights_alone
from pretrain.core.cli import add_json_option, command_parser, write_json
from pretrain.core.errors import ConfigError, run_command
from pretrain.core.figures import save_figure
from pretrain.evaluation.device import choose_device
from pretrain.evaluation.generation.sampling import Sampling
from pretrain.evaluation.heldout.length_arguments import add_lengths, length_options
from pretrain.evaluation.human.command import add_human, asks_for_humans, run_human
from pretrain.evaluation.needle.arguments import add_needles, needle_options
from pretrain.evaluation.plot import evaluation_figure
from pretrain.evaluation.report import markdown, write_markdown, write_tensorboard
from pretrain.evaluation.result import EvaluationResult
from pretrain.evaluation.tasks.harness import check_tasks
from pretrain.evaluation.tasks.suite import CodeOptions, HeldoutOptions, Suite, TaskOptions
from pretrain.evaluation.watch import Parent, watch
from pretrain.export.hf_files import is_hf_folder

EXAMPLES = """\
  python tools/evaluate.py --checkpoint runs/quickstart/checkpoints/latest
  python tools/evaluate.py --checkpoint runs/quickstart/checkpoints/step_300 --max-windows 64 \\
      --no-bigram --json -
  python tools/evaluate.py --checkpoint runs/quickstart/checkpoints/latest --window 1024 \\
      --stride 256 --baselines unigram bigram 5-gram exports/other
  python tools/evaluate.py --checkpoint runs/quickstart/checkpoints/latest --max-windows 64 \\
      --lengths 256 512 1024 2048 --positions trained yarn --plot lengths.png
  # is a value found that a context states once, at each length and depth?
  python tools/evaluate.py --checkpoint runs/long_context/checkpoints/latest \\
      --needle 256 512 1024 2048 --needle-form pairs --plot needles.png
  python tools/evaluate.py --checkpoint exports/quickstart --data data/quickstart --needle \\
      --depths 0 0.5 1 --needle-samples 50 --json -
  python tools/evaluate.py --checkpoint exports/quickstart --data data/quickstart \\
      --markdown report.md --tensorboard runs/quickstart/tensorboard
  python tools/evaluate.py --checkpoint runs/quickstart/checkpoints/latest \\
      --tasks hellaswag,lambada_openai --limit 200
  python tools/evaluate.py --checkpoint exports/quickstart --tasks my_task --include-path my_tasks
  python tools/evaluate.py --checkpoint exports/quickstart --references pairs.jsonl \\
      --max-new-tokens 128
  python tools/evaluate.py --checkpoint exports/quickstart --code-problems HumanEval.jsonl \\
      --num-samples 20 --pass-at 1,10 --temperature 0.8 --max-new-tokens 256 \\
      --allow-code-execution
  # blind sheets for people who rate texts, and the score of what they sent back
  python tools/evaluate.py --checkpoint runs/quickstart/checkpoints/latest \\
      --human-against exports/other --human-prompts prompts.jsonl --human-sheet study
  python tools/evaluate.py --human-score rater_1_ann.csv rater_2_bo.csv --key study/key.json
  # each new checkpoint of a run, until the last
  python tools/evaluate.py --watch runs/quickstart --max-windows 64 --prompt "def main("

exit codes: 0 done, 2 usage, 3 data, 4 checkpoint, 5 a file cannot be written,
6 the loss is not finite"""
# Options that count something.
COUNTS = (
    "max_windows",
    "batch_size",
    "window",
    "stride",
    "limit",
    "num_samples",
    "max_new_tokens",
    "interval_steps",
    "program_memory",
    "code_max_new_tokens",
    "human_raters",
    "needle_samples",
)


def parse_arguments() -> argparse.Namespace:
    """The command's options."""
    parser = command_parser(__doc__ or "", EXAMPLES)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--checkpoint",
        type=Path,
        metavar="PATH",
        help="a step_N folder, the file 'latest', or a Hugging Face folder",
    )
    what.add_argument(
        "--watch",
        type=Path,
        metavar="RUN",
        help="each checkpoint of a run as it appears, into RUN/evaluations.jsonl and TensorBoard",
    )
    what.add_argument(
        "--human-score",
        type=Path,
        nargs="+",
        metavar="CSV",
        help="filled-in sheets of --human-sheet",
    )
    parser.add_argument(
        "--interval-steps",
        type=int,
        default=1,
        metavar="N",
        help="with --watch: steps that are a multiple of N, and the last one",
    )
    # The training that started the command: see Parent.
    parser.add_argument("--parent", type=int, nargs=3, help=argparse.SUPPRESS)
    _add_heldout(parser)
    add_lengths(parser)
    add_needles(parser)
    _add_tasks(parser)
    _add_texts(parser)
    add_human(parser)
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)"
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="windows, requests or texts at once (default: the recipe's micro batch, and 8)",
    )
    parser.add_argument(
        "--markdown", type=Path, metavar="PATH", help="also write the report as Markdown"
    )
    parser.add_argument(
        "--tensorboard",
        type=Path,
        metavar="FOLDER",
        help="also write all numbers to TensorBoard, at the checkpoint's step",
    )
    add_json_option(parser)
    return parser.parse_args()


def _add_tasks(parser: argparse.ArgumentParser) -> None:
    tasks = parser.add_argument_group("lm-evaluation-harness")
    tasks.add_argument(
        "--tasks", metavar="A,B", help="its names, or those of the files in --include-path"
    )
    tasks.add_argument(
        "--include-path",
        type=Path,
        metavar="FOLDER",
        help="more tasks: YAML files, whose data may be local files",
    )
    tasks.add_argument(
        "--num-fewshot",
        type=int,
        metavar="N",
        help="examples before each question; the task's own number by default",
    )
    tasks.add_argument(
        "--limit", type=int, metavar="N", help="only the first N documents of each task"
    )


def _add_heldout(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("held-out text")
    group.add_argument(
        "--heldout", action="store_true", help="score held-out text in addition to what is chosen"
    )
    group.add_argument(
        "--data",
        metavar="FOLDER",
        help=(
            "shards of the run's tokenizer; the run's own by default. A Hugging Face folder"
            " reads any"
        ),
    )
    group.add_argument("--split", choices=SPLITS, default="validation")
    group.add_argument(
        "--max-windows",
        type=int,
        metavar="N",
        help="score N windows spread over the split instead of all; leaves out bits per byte",
    )
    group.add_argument(
        "--window",
        type=int,
        metavar="TOKENS",
        help="context and targets (default: the training's sequence length)",
    )
    group.add_argument(
        "--stride",
        type=int,
        metavar="TOKENS",
        help="from window to window; less than a window gives each target more context",
    )
    group.add_argument(
        "--baselines",
        nargs="+",
        metavar="NAME",
        help="unigram, bigram, 5-gram ... or Hugging Face folders (default: bigram)",
    )
    group.add_argument("--no-bigram", action="store_true", help="leave out the baseline")


def _add_texts(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("texts and code")
    group.add_argument(
        "--prompt",
        action="append",
        default=[],
        dest="prompts",
        metavar="TEXT",
        help="show its continuation; may be repeated",
    )
    group.add_argument(
        "--references",
        type=Path,
        metavar="JSONL",
        help='BLEU and ROUGE: a "prompt" and a "reference" a line',
    )
    group.add_argument(
        "--code-problems",
        type=Path,
        metavar="JSONL",
        help='pass@k: HumanEval\'s "task_id", "prompt", "test", "entry_point" a line',
    )
    group.add_argument(
        "--allow-code-execution",
        action="store_true",
        help="needed for --code-problems: runs what the model writes, in a sandbox",
    )
    group.add_argument(
        "--num-samples",
        type=int,
        default=1,
        metavar="N",
        help="solutions of each problem (default: 1)",
    )
    group.add_argument("--pass-at", default="1", metavar="K,K", help="(default: 1)")
    group.add_argument(
        "--program-seconds",
        type=float,
        default=10.0,
        metavar="S",
        help="for each program (default: 10)",
    )
    group.add_argument(
        "--program-memory",
        type=int,
        default=1024,
        metavar="MIB",
        help="for each program (default: 1024)",
    )
    group.add_argument(
        "--code-temperature",
        type=float,
        metavar="T",
        help="draw code alone; as --temperature by default",
    )
    group.add_argument(
        "--code-max-new-tokens",
        type=int,
        metavar="N",
        help="of a solution; as --max-new-tokens by default",
    )
    group.add_argument(
        "--temperature", type=float, help="draw texts and code; the likeliest token by default"
    )
    group.add_argument("--top-p", type=float, metavar="P", help="with --temperature")
    group.add_argument("--seed", type=int, default=0, help="with --temperature (default: 0)")
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="ends a text; may be repeated"
    )
    group.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="(default: 64)")


def knows_its_data(checkpoint: Path) -> bool:
    """Whether a checkpoint records its training data; Hugging Face folders do not.

    Raises:
        CheckpointError: if there is no checkpoint.
    """
    return not is_hf_folder(checkpoint) and not is_weights_alone(
        read_state(resolve_checkpoint(checkpoint))
    )


def suite_of(arguments: argparse.Namespace) -> Suite:
    """The evaluations that the options ask for.

    Raises:
        ConfigError: for a number below 1, or for code that must not be executed.
    """
    check_arguments(arguments)
    chosen = arguments.tasks or arguments.prompts or arguments.references or arguments.code_problems
    chosen = chosen or arguments.lengths or arguments.needle is not None
    heldout = heldout_options(arguments)
    return Suite(
        device=choose_device(arguments.device),
        heldout=heldout if arguments.heldout or not chosen else None,
        lengths=length_options(arguments),
        needles=needle_options(arguments),
        tasks=task_options(arguments),
        prompts=arguments.prompts,
        references=arguments.references,
        code=code_options(arguments),
        sampling=sampling_options(arguments),
        max_new_tokens=arguments.max_new_tokens,
        stop=stop_strings(arguments),
        batch_size=arguments.batch_size,
    )


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raises :class:`ConfigError` for a number below 1, or for code that must not be executed."""
    for option in COUNTS:
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise ConfigError(f"--{option.replace('_', '-')} is {value}: give 1 or more")
    if arguments.code_problems is not None and not arguments.allow_code_execution:
        raise ConfigError(
            "--code-problems runs programs that the model writes: allow it with"
            " --allow-code-execution"
        )
    if not arguments.pass_at.replace(",", "").isdigit():
        raise ConfigError(
            f"--pass-at is {arguments.pass_at}: give whole numbers with commas between them, such"
            " as 1,10"
        )


def heldout_options(arguments: argparse.Namespace) -> HeldoutOptions:
    """How held-out text is scored; by default against a bigram model if it can be fitted."""
    # An n-gram needs the training data, and would be fitted again for each checkpoint of a run.
    plain = arguments.no_bigram or arguments.watch or not knows_its_data(arguments.checkpoint)
    baselines = tuple(arguments.baselines or (() if plain else ("bigram",)))
    return HeldoutOptions(
        arguments.data,
        arguments.split,
        arguments.max_windows,
        baselines,
        arguments.window,
        arguments.stride,
    )


def task_options(arguments: argparse.Namespace) -> TaskOptions | None:
    """The tasks of lm-evaluation-harness."""
    if not arguments.tasks:
        return None
    return TaskOptions(
        arguments.tasks.split(","),
        arguments.include_path,
        arguments.num_fewshot,
        arguments.limit,
    )


def code_options(arguments: argparse.Namespace) -> CodeOptions | None:
    """The programming problems, and the limits of the programs."""
    if arguments.code_problems is None:
        return None
    return CodeOptions(
        arguments.code_problems,
        arguments.num_samples,
        pass_at=tuple(int(k) for k in arguments.pass_at.split(",") if k),
        timeout_seconds=arguments.program_seconds,
        memory_bytes=arguments.program_memory << 20,  # MiB on the command line
        sampling=_drawn(arguments.code_temperature, arguments),
        max_new_tokens=arguments.code_max_new_tokens,
    )


def _drawn(temperature: float | None, arguments: argparse.Namespace) -> Sampling | None:
    """How texts are drawn at a temperature; None without one."""
    if temperature is None:
        return None
    return Sampling(temperature, top_p=arguments.top_p, seed=arguments.seed)


def sampling_options(arguments: argparse.Namespace) -> Sampling:
    """How texts are drawn: greedily unless a temperature is given."""
    drawn = _drawn(arguments.temperature, arguments)
    return drawn or Sampling(top_p=arguments.top_p, greedy=True, seed=arguments.seed)


def stop_strings(arguments: argparse.Namespace) -> list[str]:
    """What ends a text; \\n on the command line is a line's end."""
    return [string.replace("\\n", "\n") for string in arguments.stop]


def publish(result: EvaluationResult, arguments: argparse.Namespace) -> None:
    """Prints the report, and writes the files that were asked for."""
    if arguments.json_path != "-":
        print(markdown(result))
    if arguments.markdown is not None:
        write_markdown(result, arguments.markdown)
    if arguments.tensorboard is not None:
        write_tensorboard(result, arguments.tensorboard, result.get("step") or 0)
    if arguments.plot is not None:
        figure = evaluation_figure(result, result["checkpoint"].replace("$", r"\$"))
        save_figure(figure, arguments.plot)
    write_json(result, arguments.json_path)


def main() -> None:
    """The command."""
    arguments = parse_arguments()
    if asks_for_humans(arguments):
        check_arguments(arguments)
        run_human(arguments, sampling_options(arguments), stop_strings(arguments))
        return
    suite = suite_of(arguments)
    if arguments.watch is None:
        publish(suite.run(arguments.checkpoint), arguments)
        return
    # A training that runs in parallel has priority.
    os.nice(10 if arguments.parent is not None else 0)
    # Not only when the first checkpoint is there.
    if arguments.tasks:
        check_tasks(arguments.tasks.split(","), arguments.include_path)
    parent = None if arguments.parent is None else Parent(*arguments.parent)
    count = watch(arguments.watch, suite.run, arguments.interval_steps, parent)
    if arguments.json_path != "-":
        print(
            f"evaluated {count} checkpoints of {arguments.watch}: see"
            f" {arguments.watch / 'evaluations.jsonl'}"
        )
    write_json({"run": str(arguments.watch), "evaluated": count}, arguments.json_path)


command = partial(run_command, main)  # moe-evaluate

if __name__ == "__main__":
    command()
