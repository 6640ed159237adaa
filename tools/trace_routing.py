#!/usr/bin/env python
# PYTHON_ARGCOMPLETE_OK
"""Shows which experts each token of a text chooses, layer by layer, or repeats recorded choices.

The recorded choices of one model, forced on another, separate what its routing changed from what
its experts did: two checkpoints, or two precisions of one.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

from pretrain.core import startup  # not found? Run `pip install -e .` in the checkout.

startup.prepare()  # before the slow imports

import torch
from rich.console import Console
from rich.table import Table

from data_pipeline.tokenizer.files import tokenizer_file
from data_pipeline.tokenizer.tokenizer import load_tokenizer
from pretrain.analysis.routing_trace import Replay, RoutingTrace, read_trace, record, replay
from pretrain.analysis.routing_views import lines_of, page_of, shown, table_of
from pretrain.checkpoint.layout import read_state
from pretrain.checkpoint.weights import load_model
from pretrain.core.cli import add_json_option, command_parser, write_json
from pretrain.core.errors import ConfigError, DataError, StorageError, run_command
from pretrain.core.files import write_synced
from pretrain.evaluation.checkpoint import whole_checkpoint
from pretrain.evaluation.device import choose_device
from pretrain.evaluation.generation.generators import (
    NativeGenerator,
    TransformersGenerator,
    open_transformers,
)
from pretrain.export.hf_files import is_hf_folder

EXAMPLES = """\
  python tools/trace_routing.py --model runs/quickstart/checkpoints/latest --text "def main(x):"
  python tools/trace_routing.py --model exports/quickstart --text-file main.py --html routing.html
  python tools/trace_routing.py --model runs/quickstart/checkpoints/step_100 \\
      --text-file main.py --max-tokens 200 --out routing.json --layer 3
  # the choices of step 100 with the experts of step 300, and in bf16
  python tools/trace_routing.py --model runs/quickstart/checkpoints/step_300 --replay routing.json
  python tools/trace_routing.py --model runs/quickstart/checkpoints/step_100 \\
      --replay routing.json --dtype bf16

exit codes: 0 done, 2 usage or a model that cannot do it, 3 a damaged trace or text, 4 checkpoint,
5 a file that cannot be written"""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Model = NativeGenerator | TransformersGenerator


def parse_arguments() -> argparse.Namespace:
    """The command's options."""
    parser = command_parser(__doc__ or "", EXAMPLES)
    parser.add_argument(
        "--model",
        type=Path,
        required=True,
        metavar="PATH",
        help="a step_N folder, the file 'latest', or a Hugging Face folder",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", help="the text to trace")
    what.add_argument("--text-file", type=Path, metavar="PATH", help="a UTF-8 file of it")
    what.add_argument(
        "--replay",
        type=Path,
        metavar="JSON",
        help="a file of --out: its tokens with its choices, and with this model's own",
    )
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", help="trace the first N tokens of the text"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="fp32", help="of the weights (default: fp32)"
    )
    parser.add_argument(
        "--layer", type=int, action="append", metavar="L", help="show this layer; may be repeated"
    )
    parser.add_argument(
        "--rows", type=int, default=40, metavar="N", help="tokens in the table (default: 40)"
    )
    parser.add_argument("--html", type=Path, metavar="PATH", help="write heat maps as one page")
    parser.add_argument(
        "--lines", type=Path, metavar="PATH", help="write a line for each token and layer, as text"
    )
    parser.add_argument(
        "--out", type=Path, metavar="PATH", help="record the routing of all layers, for --replay"
    )
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)"
    )
    add_json_option(parser)
    return parser.parse_args()


def open_model(path: Path, device: torch.device, dtype: str) -> tuple[Model, int | None]:
    """The model, and the step of a checkpoint.

    Raises:
        CheckpointError: if there is none, or it is damaged.
    """
    if is_hf_folder(path):
        opened = open_transformers(path, device)
        opened.model.to(DTYPES[dtype])
        return opened, None
    checkpoint = whole_checkpoint(path)
    model, recipe = load_model(checkpoint, device, DTYPES[dtype])
    tokenizer = load_tokenizer(tokenizer_file(checkpoint), recipe.data.tokenizer)
    return NativeGenerator(model, tokenizer, device), read_state(checkpoint)["step"]


def tokens_of(arguments: argparse.Namespace, opened: Model) -> list[int]:
    """The token that begins a document, and those of the text.

    Raises:
        DataError: if the file is no text, or there is none.
        ConfigError: if it is longer than the model's context.
    """
    text = arguments.text
    if arguments.text_file is not None:
        try:
            text = arguments.text_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"{arguments.text_file} cannot be read ({error}): give a UTF-8 text"
            ) from None
    if not text:
        raise DataError("the text is empty: give one with --text or --text-file")
    tokens = [*first_token(opened), *opened.encode(text)][: arguments.max_tokens]
    if len(tokens) > opened.max_positions:
        raise ConfigError(
            f"the text has {len(tokens)} tokens, and the model takes {opened.max_positions}: give "
            f"--max-tokens {opened.max_positions}"
        )
    return tokens


def first_token(opened: Model) -> list[int]:
    """Return the token that documents begin after in training; none if there was none."""
    if isinstance(opened, TransformersGenerator):
        return [opened.eod_id]
    tokenizer = opened.tokenizer
    first = tokenizer.bos_id if tokenizer.prepend_bos else tokenizer.eod_id
    return [] if first is None else [first]


def write(text: str, path: Path, option: str) -> None:
    """Write a whole file that an option names, or none.

    Raises:
        StorageError: if it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_synced(path, text.encode())
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror}; choose another {option} path"
        ) from None


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raises :class:`ConfigError` for counts below 1, and options that --replay has no use for."""
    for name in ("max_tokens", "rows"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}: give 1 or more")
    of_texts = ("max_tokens", "layer", "html", "lines", "out")
    unused = [name for name in of_texts if getattr(arguments, name)]
    if arguments.replay is not None and unused:
        raise ConfigError(
            f"--{unused[0].replace('_', '-')} is for a text, and --replay has a recorded one: leave "
            "one of them out"
        )


def publish_trace(trace: RoutingTrace, arguments: argparse.Namespace) -> None:
    """Shows a trace, and writes the files that were asked for."""
    numbers = [layer.layer for layer in trace.layers]
    unknown = sorted(set(arguments.layer or []) - set(numbers))
    if unknown:
        raise ConfigError(
            f"layer {unknown[0]} has no routed experts: those that have are {numbers}"
        )
    layers = [one for one in trace.layers if one.layer in (arguments.layer or numbers)]
    if arguments.out is not None:
        write(json.dumps(trace.model_dump(mode="json")) + "\n", arguments.out, "--out")
    if arguments.html is not None:
        write(page_of(trace, layers), arguments.html, "--html")
    if arguments.lines is not None:
        write(lines_of(trace, layers), arguments.lines, "--lines")
    if arguments.json_path != "-":
        console = Console()
        console.print(table_of(trace, layers, arguments.rows))
        rest = len(trace.tokens) - arguments.rows
        if rest > 0:
            console.print(f"{rest} more tokens: raise --rows, or see --html and --out")
        if trace.loss is not None:
            console.print(f"loss {trace.loss:.6f} nats a token")
    write_json(trace.model_dump(mode="json"), arguments.json_path)


def publish_replay(found: Replay, trace: RoutingTrace, arguments: argparse.Namespace) -> None:
    """Shows the losses with both routings, and where they differ."""
    result: dict[str, object] = {
        "model": str(arguments.model),
        "dtype": arguments.dtype,
        "recorded_from": trace.model,
        **found._asdict(),
        "layers": [layer._asdict() for layer in found.layers],
    }
    if arguments.json_path != "-":
        table = Table("layer", "tokens with other experts", "choices that differ")
        for layer in found.layers:
            table.add_row(str(layer.layer), f"{layer.tokens:.2%}", f"{layer.choices:.2%}")
        console = Console()
        console.print(table)
        for what, loss in (
            (f"recorded, by {shown(trace.model)}", found.recorded_loss),
            ("this model, its own routing", found.own_loss),
            ("this model, the recorded routing", found.replayed_loss),
        ):
            value = "-" if loss is None else f"{loss:.6f} nats a token"
            console.print(f"{what}: {value}", markup=False, highlight=False)
    write_json(result, arguments.json_path)


def main() -> None:
    """The command."""
    arguments = parse_arguments()
    check_arguments(arguments)
    trace = None if arguments.replay is None else read_trace(arguments.replay)
    opened, step = open_model(arguments.model, choose_device(arguments.device), arguments.dtype)
    if trace is not None:
        publish_replay(replay(opened, trace), trace, arguments)
        return
    tokens = tokens_of(arguments, opened)
    made = record(opened, tokens, model=str(arguments.model), step=step, dtype=arguments.dtype)
    publish_trace(made, arguments)


command = partial(run_command, main)  # moe-trace-routing

if __name__ == "__main__":
    command()
