"""The sample of the training split that a tokenizer is trained on, and the training."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path

import orjson

from data_pipeline.config import Weights
from data_pipeline.preprocess.plan import BuildPlan
from data_pipeline.preprocess.worker import SAMPLE, unit_folder
from data_pipeline.shards.split import SplitPlan
from data_pipeline.tokenizer.config import TrainedTokenizer
from data_pipeline.tokenizer.patterns import cut_before_white_space
from data_pipeline.tokenizer.tokenizer import Tokenizer
from pretrain.core.errors import ConfigError
from pretrain.core.interrupts import interruptible
from pretrain.core.progress import Stage

logger = logging.getLogger(__name__)

# A small source is read in full for its sample; of a large one, units that hold this many times
# the sample suffice.
SAMPLE_MARGIN = 4
# Units of a stream that a sample is taken from, if they are not small.
STREAM_UNITS = 16


def sample_shares(plan: BuildPlan, config: TrainedTokenizer) -> tuple[dict[str, float], list[int]]:
    """Return the share of documents to sample by source, and the units to read for it."""
    sizes: dict[str, int] = {}
    for unit in plan.units:
        sizes[unit.source] = sizes.get(unit.source, 0) + unit.size
    weights: dict[str, float] = dict(config.sample_weights or sizes)
    if unknown := set(weights) - set(sizes):
        raise ConfigError(
            f"data.tokenizer.sample_weights names the source '{min(unknown)}', but the sources"
            f" are {', '.join(sizes)}"
        )
    total = sum(weights.values()) or 1.0
    shares: dict[str, float] = {}
    numbers: list[int] = []
    for name, size in sizes.items():
        wanted = config.sample_bytes * weights.get(name, 0.0) / total
        mine = [number for number, unit in enumerate(plan.units) if unit.source == name]
        # Every stride-th unit, so that a source of many files is sampled all over.
        stride = max(1, int(size / max(wanted * SAMPLE_MARGIN, 1.0)))
        chosen = mine[::stride] if wanted else []
        read = sum(plan.units[number].size for number in chosen)
        shares[name] = min(1.0, wanted / read) if read else 0.0
        numbers += chosen
    return shares, numbers


def stream_sample(
    plan: BuildPlan, config: TrainedTokenizer
) -> tuple[dict[str, float], dict[str, int], list[int]]:
    """Return shares, bytes a unit and units to sample of streams, whose sizes may be unknown.

    Every document of the beginning of a unit is taken, from units that are spread over the source.
    """
    sources = plan.config.training_sources
    weights = dict(config.sample_weights or {})
    if not weights:
        mixture = plan.config.mixture
        weights = dict(mixture.weights) if isinstance(mixture, Weights) else {}
        weights = weights or dict.fromkeys(sources, 1.0)
    if unknown := set(weights) - set(plan.config.named_sources):
        raise ConfigError(
            f"data.tokenizer.sample_weights names the source '{min(unknown)}', but the sources"
            f" are {', '.join(plan.config.named_sources)}"
        )
    total = sum(weights.get(name, 0.0) for name in sources) or 1.0
    limits: dict[str, int] = {}
    numbers: list[int] = []
    for name in sources:
        mine = [number for number, unit in enumerate(plan.units) if unit.source == name]
        wanted = math.ceil(config.sample_bytes * weights.get(name, 0.0) / total)
        if not wanted:
            continue
        known = sum(plan.units[number].size for number in mine)
        enough = -(-wanted * len(mine) // known) if known else 0
        count = min(len(mine), max(STREAM_UNITS, enough))
        numbers += [mine[place * len(mine) // count] for place in range(count)]
        limits[name] = -(-wanted // count)
    return dict.fromkeys(limits, 1.0), limits, numbers


def training_texts(
    workspace: Path, numbers: list[int], split: SplitPlan, stage: Stage
) -> Iterator[str]:
    """Yield the sampled texts of the training split, long ones in pieces.

    Held-out documents are skipped: a vocabulary that was learned on them would flatter the
    validation loss.
    """
    for number in numbers:
        with (unit_folder(workspace, "samples", number) / SAMPLE).open("rb") as stream:
            for line in stream:
                place, text = orjson.loads(line)
                for side, part in split.assign(text, place):
                    if side == "train":
                        yield from cut_before_white_space(part)
                stage.advance(len(line))


def train_tokenizer(
    config: TrainedTokenizer,
    workspace: Path,
    numbers: list[int],
    split: SplitPlan,
    *,
    progress: bool,
) -> Tokenizer:
    """Train a tokenizer on the samples of the units with these numbers."""
    train = config.implementing_class()
    size = sum(
        (unit_folder(workspace, "samples", number) / SAMPLE).stat().st_size for number in numbers
    )
    # The bar counts the bytes that are read; the merging of pairs comes after its end.
    with Stage("training the tokenizer", progress, size, "B") as stage:
        tokenizer: Tokenizer = interruptible(
            lambda: train(training_texts(workspace, numbers, split, stage), config)
        )
    if tokenizer.vocab_size < config.vocab_size:
        logger.warning(
            "the corpus gives a vocabulary of %d entries, not %d: it is too small for more",
            tokenizer.vocab_size,
            config.vocab_size,
        )
    return tokenizer
