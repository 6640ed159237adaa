"""Chooses the fastest engine with the ids of the tokenizer's own library, and checks it."""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.tokenizer.agreement import (
    case_folding_texts,
    excerpt,
    first_difference,
    folding_characters,
    newer_unicode_texts,
    torture_texts,
)
from data_pipeline.tokenizer.boundary_probe import boundary_probe
from data_pipeline.tokenizer.engines import (
    ENGINE_NAMES,
    Engine,
    EngineUnavailableError,
    Ids,
    Offsets,
    open_engine,
)
from data_pipeline.tokenizer.reference import failure
from data_pipeline.tokenizer.tokenizer import Tokenizer
from pretrain.core.errors import DataError

logger = logging.getLogger(__name__)

REFERENCES = ("sentencepiece", "tokenizers")
LIKELY_ENGINE = "fastokens"
MOST_TOKENS_SPELLED = 1000
# All of them would slow a Turkish corpus down, in which they are common.
RISKY_EVERY = 16
_RISKY = re.compile(f"'[A-Za-z]?[{re.escape(folding_characters())}]")


@dataclass(frozen=True)
class EngineChoice:
    """An engine, and why it is none of the others.

    Attributes:
        name: of the engine.
        megabytes_per_second: of UTF-8 text, on the sample, with the threads of this process.
        reasons: for each other engine.
    """

    name: str
    megabytes_per_second: float
    reasons: dict[str, str]


def choose_engine(
    tokenizer: Tokenizer, sample: Sequence[str], opened: Mapping[str, Engine] | None = None
) -> EngineChoice:
    """Encode a sample of the corpus and hard texts with engines, and choose one.

    The hard texts are those of :mod:`~data_pipeline.tokenizer.agreement`.

    An engine is fit if all its ids are equal to those of the tokenizer's own library, which is
    itself always fit. They are tried in the order of their usual speed, and the first fit one is
    taken if it is faster than that library: to load and try the others takes longer than they would
    gain on most corpora. ``opened`` are engines that hold the tokenizer already.
    """
    reference = tokenizer.reference.engine
    torture = [
        *torture_texts([*tokenizer.reference.added_tokens][:MOST_TOKENS_SPELLED]),
        *case_folding_texts(),
        *newer_unicode_texts(tokenizer.reference.vocabulary),
    ]
    sample = list(sample) or torture
    megabytes = sum(len(text.encode("utf-8")) for text in sample) / 1e6
    start = time.perf_counter()
    expected = _rows(*open_engine(reference, tokenizer).encode_flat(sample))
    speeds = {reference: megabytes / (time.perf_counter() - start)}
    reasons = {}
    probe = boundary_probe(tokenizer)
    expected += _rows(*open_engine(reference, tokenizer).encode_flat(torture))
    for name in ENGINE_NAMES:
        if name == reference:
            continue
        if name in REFERENCES:
            reasons[name] = f"the tokenizer is a file of the {reference} library"
            continue
        if len(speeds) > 1:
            reasons[name] = "it is not faster as a rule"
            continue
        try:
            engine = (opened or {}).get(name) or open_engine(name, tokenizer)
            found = _rows(*engine.encode_flat(torture))
            start = time.perf_counter()
            flat = engine.encode_flat(sample)
            seconds = time.perf_counter() - start
        except EngineUnavailableError as error:
            reasons[name] = error.reason
            continue
        except BaseException as error:  # each library raises its own
            reasons[name] = f"it fails ({failure(error)})"
            continue
        if where := _difference(expected, [*_rows(*flat), *found], [*sample, *torture]):
            reasons[name] = f"its ids differ: {where}"
        elif probe is not None and (where := _other_cut(name, probe)):
            reasons[name] = f"it cuts words at other places: {where}"
        else:
            speeds[name] = megabytes / seconds
    best = max(speeds, key=speeds.__getitem__)
    reasons |= {
        name: f"it is slower, {speed:.0f} MB/s" for name, speed in speeds.items() if name != best
    }
    logger.info(
        "tokens by %s, %.0f MB/s; %s",
        best,
        speeds[best],
        "; ".join(f"not {name}: {reason}" for name, reason in reasons.items()),
    )
    return EngineChoice(best, speeds[best], reasons)


def _other_cut(name: str, probe: Tokenizer) -> str | None:
    """Return where an engine's ids of a probe first differ from those of its own library."""
    texts = case_folding_texts()
    try:
        found = _rows(*open_engine(name, probe).encode_flat(texts))
    except BaseException as error:  # each library raises its own
        return f"it fails ({failure(error)})"
    return _difference(probe.encode(texts), found, texts)


class CheckedEncoder:
    """An engine that is compared with the tokenizer's own library on some of the documents.

    Args:
        tokenizer: the tokenizer.
        engine_name: one of :data:`~data_pipeline.tokenizer.engines.ENGINE_NAMES`.
        check_every: a document is compared if its digest is a multiple of this, so that it is
            the same ones in every run. Where engines are most likely to differ, in contractions
            with characters that fold to ASCII letters, it is one in ``RISKY_EVERY``.

    Attributes:
        engine: the engine.
        checked: how many documents were compared.
    """

    def __init__(self, tokenizer: Tokenizer, engine_name: str, check_every: int = 1000) -> None:
        self.tokenizer = tokenizer
        self.engine_name = engine_name
        self.check_every = check_every
        self.checked = 0
        self.engine = open_engine(engine_name, tokenizer)

    def encode_flat(
        self, texts: Sequence[str], digests: Sequence[int], names: Sequence[str]
    ) -> tuple[Ids, Offsets]:
        """Encodes texts as :meth:`~data_pipeline.tokenizer.engines.Engine.encode_flat` does.

        Args:
            texts: documents.
            digests: a hash of each.
            names: what each is called in errors.

        Raises:
            DataError: if the engine fails, or gives other ids than that library.
        """
        try:
            ids, offsets = self.engine.encode_flat(texts)
        except BaseException as error:  # each library raises its own
            raise self._fault(
                f"fails on one of {names[0]} to {names[-1]} ({failure(error)})"
            ) from None
        # One condition for most documents: what either number divides, their common one does.
        common = math.gcd(self.check_every, RISKY_EVERY)
        chosen = (
            [
                number
                for number, digest in enumerate(digests)
                if digest % common == 0
                and (
                    digest % self.check_every == 0
                    or (digest % RISKY_EVERY == 0 and _is_risky(texts[number]))
                )
            ]
            if self.engine_name != self.tokenizer.reference.engine
            else []
        )
        if chosen:
            expected = self.tokenizer.encode([texts[number] for number in chosen])
            for number, row in zip(chosen, expected, strict=True):
                if (
                    position := first_difference(row, ids[offsets[number] : offsets[number + 1]])
                ) is not None:
                    raise self._fault(
                        f"gives another token {position} of {names[number]} than the"
                        f" {self.tokenizer.reference.engine} library"
                    )
            self.checked += len(chosen)
        return ids, offsets

    def _fault(self, what: str) -> DataError:
        return DataError(
            f"the engine {self.engine_name} {what}: run again with"
            f" --engine {self.tokenizer.reference.engine}, or another engine"
        )


def _is_risky(text: str) -> bool:
    return not text.isascii() and _RISKY.search(text) is not None


def _rows(ids: Ids, offsets: Offsets) -> list[np.ndarray]:
    return np.split(ids, offsets[1:-1]) if len(offsets) > 1 else []


def _difference(
    expected: Sequence[np.ndarray], found: Sequence[np.ndarray], texts: Sequence[str]
) -> str | None:
    for number, (one, other) in enumerate(zip(expected, found, strict=True)):
        if (position := first_difference(one, other)) is not None:
            return f"text {number} ({excerpt(texts[number])}), token {position}"
    return None
