#!/usr/bin/env python
"""Gain of the KV cache: greedy text with the cache against whole passes, token by token.

The model is the quickstart's with random weights.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from datetime import date
from typing import TypedDict

import torch

from pretrain.config.load import load_recipe
from pretrain.core.cli import add_json_option, command_parser, write_json
from pretrain.core.errors import run_command
from pretrain.evaluation.generation.generate import NextLogits, continue_prompts, native_next_logits
from pretrain.evaluation.generation.sampling import Sampling
from pretrain.model.decoder import DecoderLM
from pretrain.model.init import initialize

EXAMPLES = "  python benchmarks/generation.py --json benchmarks/results/generation.json"
DEVICE = torch.device("cpu")


class Measured(TypedDict):
    """Seconds of both ways after one prompt."""

    prompt_tokens: int
    new_tokens: int
    cached_seconds: float
    whole_seconds: float
    times_faster: float
    same_text: bool


def random_model(recipe: str = "quickstart") -> DecoderLM:
    """The recipe's model with the weights that training would start from."""
    model = DecoderLM(load_recipe(recipe, ["model.vocab_size=4096", "parallel.ep_size=1"]).model)
    initialize(model, seed=0)
    return model.eval()


def without_cache(model: DecoderLM) -> NextLogits:
    """The next token's logits by a pass of all tokens through the model.

    Only the last token goes through the head, as with the cache.
    """
    tokens_BS = torch.empty(1, 0, dtype=torch.int64)

    @torch.inference_mode()
    def next_logits(added_BS: torch.Tensor) -> torch.Tensor:
        nonlocal tokens_BS
        tokens_BS = torch.cat((tokens_BS, added_BS), dim=1)
        return model.project(model.hidden(tokens_BS)[:, -1:])[:, 0]

    return next_logits


def timed(next_logits: NextLogits, prompt: list[int], new_tokens: int) -> tuple[list[int], float]:
    """The new tokens, and the seconds they took."""
    # A generator: no token is computed before the clock starts.
    steps = continue_prompts(next_logits, [prompt], Sampling(greedy=True))
    started = time.perf_counter()
    tokens = [next(steps)[0] for _ in range(new_tokens)]
    return tokens, time.perf_counter() - started


def measure(model: DecoderLM, prompt_tokens: int, new_tokens: int) -> Measured:
    """Time both ways after a prompt, and compare their texts."""
    prompt = torch.randint(
        4096, (prompt_tokens,), generator=torch.Generator().manual_seed(0)
    ).tolist()
    # Warm-up: first calls allocate.
    timed(native_next_logits(model, prompt_tokens + 8, DEVICE), prompt, 8)
    cached, cached_seconds = timed(
        native_next_logits(model, prompt_tokens + new_tokens, DEVICE), prompt, new_tokens
    )
    whole, whole_seconds = timed(without_cache(model), prompt, new_tokens)
    return {
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "cached_seconds": round(cached_seconds, 3),
        "whole_seconds": round(whole_seconds, 3),
        "times_faster": round(whole_seconds / cached_seconds, 2),
        "same_text": cached == whole,
    }


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = command_parser(__doc__ or "", EXAMPLES)
    parser.add_argument("--new-tokens", type=int, default=256, metavar="N", help="(default: 256)")
    parser.add_argument(
        "--prompt-tokens",
        type=int,
        nargs="+",
        default=[1, 64, 256],
        metavar="N",
        help="(default: 1 64 256)",
    )
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="(default: 1)")
    add_json_option(parser)
    return parser.parse_args()


def main() -> None:
    """Measure every prompt length, print the results and write them."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    model = random_model()
    runs = [measure(model, tokens, arguments.new_tokens) for tokens in arguments.prompt_tokens]
    if arguments.json_path != "-":
        for run in runs:
            print(", ".join(f"{name} {value}" for name, value in run.items()))
    machine = (
        f"{os.cpu_count()} x {platform.processor() or platform.machine()}, Python"
        f" {platform.python_version()}"
    )
    result = {
        "date": date.today().isoformat(),
        "machine": machine,
        "load": round(os.getloadavg()[0], 1),
        "threads": arguments.threads,
        "runs": runs,
    }
    write_json(result, arguments.json_path)


if __name__ == "__main__":
    run_command(main)
