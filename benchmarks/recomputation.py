#!/usr/bin/env python
"""Memory and time of train.activation_checkpointing: the same pass in each form, alternating."""

from __future__ import annotations

import argparse
import statistics
import time
from datetime import UTC, datetime
from typing import get_args

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import trange

from pretrain.callbacks.environment import hardware
from pretrain.config.load import load_recipe
from pretrain.config.recipe import Recipe
from pretrain.core.cli import add_json_option, add_recipe_options, command_parser, write_json
from pretrain.core.errors import run_command
from pretrain.engine.precision import DTYPES, resolve_precision
from pretrain.model.config import Recomputation
from pretrain.model.decoder import DecoderLM
from pretrain.model.init import initialize
from pretrain.run.memory import activation_bytes
from pretrain.run.resolve import resolve_recipe

FORMS: tuple[Recomputation, ...] = get_args(Recomputation)
EXAMPLES = """\
  python benchmarks/recomputation.py
  python benchmarks/recomputation.py --set model.moe.top_k=4 --rounds 20"""


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = command_parser(__doc__ or "", EXAMPLES)
    add_recipe_options(parser, default="quickstart")
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="(default: 10)")
    add_json_option(parser)
    return parser.parse_args()


class Pass:
    """A forward and a backward pass over one micro batch of random tokens."""

    def __init__(self, recipe: Recipe) -> None:
        vocab_size = recipe.model.vocab_size
        assert vocab_size is not None
        self.model = DecoderLM(recipe.model).to(DTYPES[recipe.train.precision]).train()
        initialize(self.model, recipe.seed)
        train = recipe.train
        self.tokens_BS = torch.randint(vocab_size, (train.micro_batch_size, train.sequence_length))

    def forward(self, form: Recomputation) -> torch.Tensor:
        """The loss, with what its backward pass needs."""
        self.model.activation_checkpointing = form
        loss: torch.Tensor = self.model(self.tokens_BS, self.tokens_BS, 1.0).loss
        return loss

    def kept_bytes(self, form: Recomputation) -> int:
        """Bytes that the allocator gave out in a forward pass and did not get back."""
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            loss = self.forward(form)
        kept = sum(event.self_cpu_memory_usage for event in profiler.key_averages())
        # Alive until here: with it all that is kept for the backward pass.
        del loss
        return int(kept)

    def seconds(self, form: Recomputation) -> float:
        """CPU seconds of both passes."""
        started = time.process_time()
        self.forward(form).backward()
        return time.process_time() - started


def main() -> int:
    """Measure each form, print the ratios and write the result."""
    options = parse_arguments()
    torch.set_num_threads(1)
    recipe = load_recipe(options.recipe, options.overrides)
    recipe = resolve_recipe(recipe, resolve_precision(recipe.train.precision), None)
    one = Pass(recipe)
    rounds = []
    for number in trange(options.rounds + 1, desc="rounds"):
        # Another form comes first in each round.
        order = [FORMS[(number + place) % len(FORMS)] for place in range(len(FORMS))]
        rounds.append({form: one.seconds(form) for form in order})
    result = {
        "recipe": recipe.name,
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": hardware(),
        "torch": torch.__version__,
        "precision": recipe.train.precision,
        "rounds": options.rounds,
        "forms": {},
    }
    for form in FORMS:
        # The first round also allocates.
        ratios = sorted(times[form] / times["none"] for times in rounds[1:])
        train = recipe.train.model_copy(update={"activation_checkpointing": form})
        result["forms"][form] = {
            "kept_bytes": one.kept_bytes(form),
            "estimated_bytes": activation_bytes(recipe.model, train, recipe.train.precision),
            "cpu_seconds_over_none": statistics.median(ratios),
            "quartiles": [ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]],
        }
        if options.json_path != "-":
            measured = result["forms"][form]
            print(
                f"{form}: {measured['kept_bytes'] / 1e6:,.1f} MB kept (estimated "
                f"{measured['estimated_bytes'] / 1e6:,.1f}), "
                f"{measured['cpu_seconds_over_none']:.3f} of the CPU time"
            )
    write_json(result, options.json_path)
    return 0


if __name__ == "__main__":
    run_command(main)
