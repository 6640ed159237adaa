"""Contexts of an exact length: a needle at a depth of filler text, and the question at the end."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.shards.token_stream import TokenStream
from pretrain.core.errors import ConfigError, DataError
from pretrain.evaluation.generation.generators import TextGenerator
from pretrain.evaluation.needle.forms import NeedleForm

# Draws of a key that the filler does not hold, before the filler is said to hold all of them.
DRAWS = 1000
# Tokens read for each token of filler: those around documents are left out.
READ_AHEAD = 4


@dataclass(frozen=True)
class Context:
    """What a model reads, and what it has to continue with."""

    prompt: list[int]
    value: list[int]


@dataclass(frozen=True)
class Needle:
    """Token ids of a needle, of its question, and of the value that the question asks for."""

    whole: list[int]
    question: list[int]
    value: list[int]

    def context(self, filler: Sequence[int], tokens: int, depth: float) -> Context:
        """A prompt of so many tokens.

        Args:
            filler: at least ``tokens`` less those of the needle and the question.
            depth: share of the filler that comes before the needle, from 0 to 1.

        Raises:
            ConfigError: if needle and question alone are longer.
        """
        room = tokens - len(self.whole) - len(self.question)
        if room < 0:
            raise ConfigError(
                f"--needle has contexts that leave {tokens} tokens before the value, and a needle"
                f" with its question takes {tokens - room}: give longer ones"
            )
        before = round(depth * room)
        prompt = [*filler[:before], *self.whole, *filler[before:room], *self.question]
        return Context(prompt, self.value)


@dataclass(frozen=True)
class Haystack:
    """A needle for each sample, and filler for the longest context."""

    needles: list[Needle]
    fillers: list[list[int]]

    def contexts(self, length: int, depth: float) -> list[Context]:
        """One context of each sample; shorter ones begin with the same filler.

        All prompts have the same number of tokens: ``length`` less those of the longest value.
        """
        tokens = length - max(len(needle.value) for needle in self.needles)
        return [
            needle.context(filler, tokens, depth)
            for needle, filler in zip(self.needles, self.fillers, strict=True)
        ]


def make_haystack(
    opened: TextGenerator,
    form: NeedleForm,
    stream: TokenStream,
    around: frozenset[int],
    longest: int,
    samples: int,
    seed: int,
) -> Haystack:
    """Needles and fillers, the same ones for the same tokenizer, text and seed.

    Args:
        stream: text in the model's tokens.
        around: tokens that begin or end a document; the filler has none of them.

    Raises:
        DataError: if the text is too short, or holds all needles already.
        ConfigError: if the tokenizer cannot spell the needles.
    """
    needles, fillers = [], []
    for sample in range(samples):
        start = sample * max(0, stream.num_tokens - READ_AHEAD * longest) // samples
        filler = _filler(stream, around, start, longest)
        source = random.Random(f"{seed} {sample}")
        needles.append(_needle_not_in(filler, opened, form, source))
        fillers.append(filler.tolist())
    return Haystack(needles, fillers)


def _filler(stream: TokenStream, around: frozenset[int], start: int, longest: int) -> np.ndarray:
    tokens = stream.read(start, min(READ_AHEAD * longest, stream.num_tokens - start))
    tokens = tokens[~np.isin(tokens, list(around))][:longest].astype(np.int64)
    if len(tokens) < longest:
        raise DataError(
            f"the split has {stream.num_tokens} tokens, and the filler of one context needs"
            f" {longest} without those around documents: give shorter --needle lengths or more"
            " --data"
        )
    return tokens


def _needle_not_in(
    filler: np.ndarray, opened: TextGenerator, form: NeedleForm, source: random.Random
) -> Needle:
    """Return a needle whose question the filler does not hold, so that it has one value alone."""
    for _ in range(DRAWS):
        key, value = form.draw(source)
        needle = encode_needle(opened, form, key, value)
        if not _holds(filler, needle.question):
            return needle
    raise DataError(
        f"the filler holds every key of the needle's form {form.name}: choose another with"
        " --needle-form, or other --data"
    )


def _holds(tokens: np.ndarray, wanted: Sequence[int]) -> bool:
    if len(wanted) > len(tokens):
        return False
    windows = np.lib.stride_tricks.sliding_window_view(tokens, len(wanted))
    return bool((windows == np.array(wanted)).all(axis=1).any())


def encode_needle(opened: TextGenerator, form: NeedleForm, key: str, value: str) -> Needle:
    """A needle in the model's tokens.

    Raises:
        ConfigError: if the tokenizer cannot spell it: unknown words would all look alike, and the
            model would score without knowing the value.
    """
    question = opened.encode(form.question(key))
    stated = opened.encode(form.until_value(key, value))
    value_ids = stated[len(question) :]
    spelled = key in opened.decode(question) and value in opened.decode(value_ids)
    if stated[: len(question)] != question or not spelled:
        raise ConfigError(
            f"the tokenizer cannot spell the needle '{form.until_value(key, value).strip()}' with"
            " tokens of its value alone: choose another --needle-form"
        )
    rest = form.needle(key, value).removeprefix(form.until_value(key, value))
    return Needle([*stated, *opened.encode(rest)], question, value_ids)
