#!/usr/bin/env python
"""Continues a prompt with one of our checkpoints or with a Hugging Face folder."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the command runs from a checkout, from any folder

from pretrain.config.cli import add_json_option, command_parser, write_json
from pretrain.config.errors import ConfigError, run_command
from pretrain.evaluation.device import choose_device
from pretrain.evaluation.generation import Sampling, generate
from pretrain.evaluation.generators import open_generator
from pretrain.evaluation.speculative import DraftCounts, generate_with_drafts

EXAMPLES = """\
  python tools/generate.py --model runs/quickstart/checkpoints/latest --prompt "def main("
  python tools/generate.py --model exports/quickstart --prompt "import os" --greedy --max-new-tokens 128
  python tools/generate.py --model runs/mtp/checkpoints/latest --prompt "import os" --draft"""


def parse_arguments() -> argparse.Namespace:
    parser = command_parser(__doc__ or "", EXAMPLES)
    parser.add_argument("--model", required=True, metavar="PATH", help="a step_N folder, the file 'latest', or a Hugging Face folder")
    parser.add_argument("--prompt", required=True, help="text to continue; an empty one starts a new document")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="(default: 64)")
    parser.add_argument("--temperature", type=float, default=0.8, help="(default: 0.8)")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw from the fewest tokens that hold the probability P")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--greedy", action="store_true", help="always take the likeliest token")
    parser.add_argument("--draft", action="store_true", help="speculative decoding with the model's multi-token prediction: same text, fewer passes")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add_json_option(parser)
    return parser.parse_args()


def progress(tokens: int) -> tqdm:
    return tqdm(range(tokens), desc="generating", unit="token")


def main() -> None:
    arguments = parse_arguments()
    if arguments.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens is {arguments.max_new_tokens}: give 1 or more")
    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.greedy, arguments.seed)
    generator = open_generator(Path(arguments.model), choose_device(arguments.device))
    prompt_ids = generator.encode(arguments.prompt) or [generator.eod_id]
    max_tokens = len(prompt_ids) + arguments.max_new_tokens
    counts: DraftCounts | None = None
    if arguments.draft:
        drafting = generator.start_drafting(max_tokens)
        started, steps = time.perf_counter(), progress(arguments.max_new_tokens)
        new_ids, counts = generate_with_drafts(drafting, prompt_ids, sampling, generator.eod_id, steps)
    else:
        next_logits = generator.start(max_tokens)
        started, steps = time.perf_counter(), progress(arguments.max_new_tokens)
        new_ids = generate(next_logits, prompt_ids, sampling, generator.eod_id, steps)
    seconds = time.perf_counter() - started
    ended = new_ids[-1] == generator.eod_id
    text = generator.decode(new_ids[:-1] if ended else new_ids)
    if arguments.json_path != "-":
        print(arguments.prompt + text)
    if counts is not None:
        print(f"{counts.accepted} of {counts.drafted} drafted tokens were accepted ({counts.accepted_share:.0%})", file=sys.stderr)
    result = {
        "model": arguments.model,
        "prompt": arguments.prompt,
        "text": text,
        "new_tokens": len(new_ids),
        "ended": "end of document" if ended else "max_new_tokens",
        "tokens_per_second": round(len(new_ids) / seconds, 2),
    }
    if counts is not None:
        result |= {"drafted_tokens": counts.drafted, "accepted_share": round(counts.accepted_share, 4)}
    write_json(result, arguments.json_path)


if __name__ == "__main__":
    run_command(main)
