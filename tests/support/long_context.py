"""The recipe ``long_context`` in small: a corpus, its shards and a run of both phases."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from pretrain.checkpoint.layout import resolve_checkpoint
from tests.support.paths import TOOLS
from tests.support.tiny_run import Started, start_ranks

SHORT_TOKENS, LONG_TOKENS = 32, 128
# Eight short sequences a step, and two long ones: 256 tokens.
STEP_TOKENS, SHORT_STEPS, LONG_STEPS = 256, 8, 4
SIZES = (
    f"train.sequence_length={SHORT_TOKENS}",
    f"model.max_position_embeddings={LONG_TOKENS}",
    "model.hidden_size=32",
    "model.moe.moe_intermediate_size=16",
    "train.global_batch_size=8",
    "train.micro_batch_size=4",
    f"train.train_tokens={(SHORT_STEPS + LONG_STEPS) * STEP_TOKENS}",
    f"phases.0.tokens={SHORT_STEPS * STEP_TOKENS}",
    f"phases.1.sequence_length={LONG_TOKENS}",
    "phases.1.global_batch_size=2",
    "phases.1.micro_batch_size=1",
    "schedule.warmup_steps=2",
    "logging.interval_steps=1",
    "checkpoint.interval_steps=100",
    "validation.interval_steps=100",
)


@dataclass(frozen=True)
class LongContext:
    """Texts and shards in a folder, for any number of runs."""

    folder: Path
    data: Path

    def settings(self, run: Path, *overrides: str) -> list[str]:
        """Options of the training command for a small run in the folder ``run``.

        ``overrides`` such as ``parallel.sp_size=2`` come last and win.
        """
        texts = self.folder / "texts"
        settings = (
            f"run_path={run}",
            f"data.path={self.data}",
            f"data.sources.short.input=[{texts / 'short.jsonl'}]",
            f"data.sources.long.input=[{texts / 'long.jsonl'}]",
            f"data.tokenizer.path={texts / 'tokenizer.json'}",
            *SIZES,
            *overrides,
        )
        return ["--recipe", "long_context", *(f"--set={setting}" for setting in settings)]

    def train(self, run: Path, *overrides: str, world_size: int = 1) -> Path:
        """Train both phases on so many ranks; return the last checkpoint."""
        arguments = self.settings(run, *overrides)
        for rank in start_ranks(arguments, self.folder, world_size=world_size):
            assert rank.wait() == 0, rank.stdout + rank.stderr
        return resolve_checkpoint(run / "checkpoints" / "latest")


def make_long_context(folder: Path) -> LongContext:
    """Build the corpus with the commands that a user types."""
    made = LongContext(folder, folder / "data")
    sizes = ("--short-tokens", SHORT_TOKENS, "--short-documents", 200, "--max-keys", 24)
    sizes += ("--long-tokens", LONG_TOKENS, "--long-documents", 60, "--long-max-keys", 24)
    corpus = [TOOLS / "make_needle_corpus.py", "--output", folder / "texts", *sizes]
    shards = [TOOLS / "preprocess_data.py", *made.settings(folder / "unused")]
    for command in (corpus, shards):
        started = Started([sys.executable, *map(str, command)], folder)
        assert started.wait() == 0, started.stdout + started.stderr
    return made
