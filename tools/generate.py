#!/usr/bin/env python
# PYTHON_ARGCOMPLETE_OK
"""Continues prompts with a checkpoint of this project or a Hugging Face folder."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NotRequired, TypedDict, cast

from pretrain.core import startup  # not found? Run `pip install -e .` in the checkout.

startup.prepare()  # before the slow imports

from pretrain.core.cli import add_json_option, command_parser, write_json
from pretrain.core.errors import ConfigError, DataError, run_command
from pretrain.evaluation.device import choose_device
from pretrain.evaluation.generation.generators import open_generator
from pretrain.evaluation.generation.sampling import Sampling
from pretrain.evaluation.generation.writing import Continuation, Writer
from pretrain.evaluation.result import WrittenText

EXAMPLES = """\
  python tools/generate.py --model runs/quickstart/checkpoints/latest --prompt "def main("
  python tools/generate.py --model exports/quickstart --prompt "import os" --greedy \\
      --max-new-tokens 128
  python tools/generate.py --model runs/quickstart/checkpoints/latest \\
      --prompts-file prompts.jsonl --num-samples 4 --batch-size 16 --json texts.json
  python tools/generate.py --model exports/quickstart --prompt "def f(x):" --top-p 0.95 \\
      --min-p 0.05 --repetition-penalty 1.1 --stop "\\n\\n"
  python tools/generate.py --model runs/mtp/checkpoints/latest --prompt "import os" --draft

exit codes: 0 done, 2 usage, 3 the prompts cannot be read, 4 no checkpoint or a damaged one,
5 a file cannot be written"""


class GenerationResult(TypedDict):
    """The command's result as JSON; the last two are there with ``--draft``."""

    model: str
    samples: list[WrittenText]
    prefill_tokens_per_second: float
    tokens_per_second: float
    drafted_tokens: NotRequired[int]
    accepted_share: NotRequired[float]


def parse_arguments() -> argparse.Namespace:
    """The command's options."""
    parser = command_parser(__doc__ or "", EXAMPLES)
    parser.add_argument(
        "--model",
        required=True,
        metavar="PATH",
        help="a step_N folder, the file 'latest', or a Hugging Face folder",
    )
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument(
        "--prompt",
        action="append",
        dest="prompts",
        metavar="TEXT",
        help="text to continue; may be repeated; '' starts a document",
    )
    prompts.add_argument(
        "--prompts-file",
        type=Path,
        metavar="PATH",
        help='a prompt a line; of a file named *.jsonl, the field "prompt" of each line',
    )
    parser.add_argument(
        "--num-samples", type=int, default=1, metavar="N", help="texts of each prompt (default: 1)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="texts written at once (default: 8)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="(default: 64)")
    _add_sampling(parser)
    parser.add_argument(
        "--draft",
        action="store_true",
        help=(
            "speculative decoding with the model's multi-token prediction: same text, fewer passes"
        ),
    )
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)"
    )
    add_json_option(parser)
    return parser.parse_args()


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--temperature", type=float, default=0.8, help="(default: 0.8)")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    parser.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="draw from the fewest tokens that hold the probability P",
    )
    parser.add_argument(
        "--min-p",
        type=float,
        metavar="P",
        help="draw from tokens with at least P times the likeliest one's probability",
    )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="of tokens that were there already (default: 1, none)",
    )
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="ends a text, and is left out of it; may be repeated",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the first text, each further one has the next number (default: 0)",
    )
    parser.add_argument("--greedy", action="store_true", help="always take the likeliest token")


def read_prompts(path: Path) -> list[str]:
    """The prompts in a file: a line each, or the field "prompt" of each line of a .jsonl.

    Raises:
        DataError: if it cannot be read, has no prompt, or a line of a .jsonl is no such object.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        prompts = (
            [json.loads(line)["prompt"] for line in lines] if path.suffix == ".jsonl" else lines
        )
    except OSError as error:
        raise DataError(f"--prompts-file {path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise DataError(
            f'--prompts-file {path} has a line that is no JSON object with a "prompt", or is not'
            " UTF-8: correct it"
        ) from None
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise DataError(
            f"--prompts-file {path} has no prompt, or one that is no text: give one a line"
        )
    return prompts


def show(piece: str) -> None:
    """Prints a piece of text at once; characters that the terminal cannot show become "?"."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(piece.encode(encoding, errors="replace").decode(encoding))
    sys.stdout.flush()


def write_texts(
    arguments: argparse.Namespace, writer: Writer, prompts: list[str]
) -> list[Continuation]:
    """Continues each prompt; a single text is shown while it is written."""
    quiet = arguments.json_path == "-"
    if len(prompts) == 1:
        encoded = writer.prompt_ids(prompts[0])
        # The prompt is shown with the first new piece, so that an error before it has its own line.
        pieces = [prompts[0]]

        def piece(new: str) -> None:
            pieces.append(new)
            if not quiet:
                show("".join(pieces))
            pieces.clear()

        text = (
            writer.write_drafted(encoded, piece)
            if arguments.draft
            else writer.write_batch([encoded], show=piece)[0]
        )
        if not quiet:
            show("\n")
        return [text]
    if arguments.draft:
        raise ConfigError(
            "--draft writes one text at a time: give one --prompt and leave --num-samples out"
        )
    texts = writer.write(prompts, arguments.batch_size)
    if not quiet:
        for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True), start=1):
            show(
                f"--- {number} of {len(texts)}: {text.new_tokens} tokens,"
                f" {text.ended}\n{prompt}{text.text}\n"
            )
    return texts


def report(
    arguments: argparse.Namespace, writer: Writer, prompts: list[str], texts: list[Continuation]
) -> GenerationResult:
    """Prints speeds to standard error; returns the whole result."""
    speed = writer.speed
    drafts = writer.drafts
    result: GenerationResult = {
        "model": arguments.model,
        "samples": [
            cast(WrittenText, {"prompt": prompt, **asdict(text)})
            for prompt, text in zip(prompts, texts, strict=True)
        ],
        "prefill_tokens_per_second": round(speed.prefill_tokens_per_second, 2),
        "tokens_per_second": round(speed.decode_tokens_per_second, 2),
    }
    print(
        f"prefill: {speed.prefill_tokens} tokens at {result['prefill_tokens_per_second']:,.0f}"
        f" tokens/s; decode: {speed.decode_tokens} tokens at {result['tokens_per_second']:,.1f}"
        " tokens/s",
        file=sys.stderr,
    )
    if arguments.draft:
        print(
            f"{drafts.accepted} of {drafts.drafted} drafted tokens were accepted"
            f" ({drafts.accepted_share:.0%})",
            file=sys.stderr,
        )
        result["drafted_tokens"] = drafts.drafted
        result["accepted_share"] = round(drafts.accepted_share, 4)
    return result


def main() -> None:
    """The command."""
    arguments = parse_arguments()
    for option in ("max_new_tokens", "num_samples", "batch_size"):
        if getattr(arguments, option) < 1:
            raise ConfigError(
                f"--{option.replace('_', '-')} is {getattr(arguments, option)}: give 1 or more"
            )
    fields = ("temperature", "top_k", "top_p", "greedy", "seed", "min_p", "repetition_penalty")
    sampling = Sampling(**{field: getattr(arguments, field) for field in fields})
    prompts = (
        arguments.prompts if arguments.prompts is not None else read_prompts(arguments.prompts_file)
    )
    # Samples of a prompt are next to each other, each with its own seed.
    prompts = [prompt for prompt in prompts for _ in range(arguments.num_samples)]
    # A shell passes "\n" as two characters.
    stop = [string.replace("\\n", "\n").replace("\\t", "\t") for string in arguments.stop]
    generator = open_generator(Path(arguments.model), choose_device(arguments.device))
    if generator.call_dependence is not None:
        print(f"note: {generator.call_dependence}", file=sys.stderr)
    writer = Writer(generator, sampling, arguments.max_new_tokens, stop)
    texts = write_texts(arguments, writer, prompts)
    write_json(report(arguments, writer, prompts, texts), arguments.json_path)


command = partial(run_command, main)  # moe-generate

if __name__ == "__main__":
    command()
