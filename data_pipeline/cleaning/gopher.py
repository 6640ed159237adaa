"""Quality and repetition rules of MassiveText (Rae et al. 2021, appendix A.1.1 and table A1).

The paper is "Scaling Language Models: Methods, Analysis & Insights from Training Gopher".

A word is the text between white space, so the rules suit languages that write spaces.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline.cleaning.config import GopherQuality, GopherRepetition
from data_pipeline.cleaning.stage import Cleaned

STOP_WORDS = frozenset("the be to of and that have with".split())
BULLETS = ("•", "‣", "▶", "◀", "◦", "■", "□", "▪", "▫", "–", "-", "*")
ELLIPSES = ("...", "…")
LETTER = re.compile(r"[^\W\d_]")
PARAGRAPH_BREAK = re.compile(r"\n\s*\n")


class GopherQualityFilter:
    """The rules on words, symbols and lines (appendix A.1.1, "Quality Filtering")."""

    def __init__(self, config: GopherQuality) -> None:
        self.config = config

    def __call__(self, text: str) -> Cleaned:
        for reason, detail in self._faults(text):
            return Cleaned(text, reason, detail)
        return Cleaned(text)

    def _faults(self, text: str) -> Iterator[tuple[str, str]]:
        limits = self.config
        words = text.split()
        if len(words) < limits.min_words:
            yield "gopher_min_words", f"{len(words)} words, the least is {limits.min_words}"
        if len(words) > limits.max_words:
            yield "gopher_max_words", f"{len(words)} words, the most is {limits.max_words}"
        if not words:
            return
        mean = sum(map(len, words)) / len(words)
        if not limits.min_mean_word_length <= mean <= limits.max_mean_word_length:
            allowed = f"{limits.min_mean_word_length:g} to {limits.max_mean_word_length:g}"
            yield "gopher_mean_word_length", f"mean word length {mean:.2f}, allowed is {allowed}"
        # "For either the hash symbol or the ellipsis": each on its own.
        ratio = max(text.count("#"), sum(map(text.count, ELLIPSES))) / len(words)
        if ratio > limits.max_symbol_word_ratio:
            yield (
                "gopher_symbol_word_ratio",
                f"{ratio:.3f} symbols per word, the most is {limits.max_symbol_word_ratio:g}",
            )
        lines = [line for line in map(str.strip, text.split("\n")) if line]
        bullets = sum(line.startswith(BULLETS) for line in lines) / len(lines)
        if bullets > limits.max_bullet_lines:
            yield (
                "gopher_bullet_lines",
                f"a share of {bullets:.3f}, the most is {limits.max_bullet_lines:g}",
            )
        ellipses = sum(line.endswith(ELLIPSES) for line in lines) / len(lines)
        if ellipses > limits.max_ellipsis_lines:
            yield (
                "gopher_ellipsis_lines",
                f"a share of {ellipses:.3f}, the most is {limits.max_ellipsis_lines:g}",
            )
        alphabetic = sum(word.isalpha() or LETTER.search(word) is not None for word in words) / len(
            words
        )
        if alphabetic < limits.min_alphabetic_words:
            yield (
                "gopher_alphabetic_words",
                f"a share of {alphabetic:.3f}, the least is {limits.min_alphabetic_words:g}",
            )
        stop_words = len(STOP_WORDS.intersection(text.lower().split()))
        if stop_words < limits.min_stop_words:
            yield (
                "gopher_stop_words",
                f"{stop_words} different stop words, the least is {limits.min_stop_words}",
            )


class GopherRepetitionFilter:
    """The limits of table A1.

    Of equal lines, paragraphs and n-grams those after the first count as duplicates.

    Characters of n-grams are those of their words, each counted once however many n-grams it is
    in.
    """

    def __init__(self, config: GopherRepetition) -> None:
        self.config = config
        self.top = config.max_top_ngram_characters
        self.duplicate = config.max_duplicate_ngram_characters
        self.longest = max([*self.top, *self.duplicate], default=0)

    def __call__(self, text: str) -> Cleaned:
        for reason, share, limit, detail in self._shares(text):
            if share > limit:
                return Cleaned(
                    text, reason, f"{detail}a share of {share:.3f}, the most is {limit:g}"
                )
        return Cleaned(text)

    def _shares(self, text: str) -> Iterator[tuple[str, float, float, str]]:
        config = self.config
        lines = [line for line in map(str.strip, text.split("\n")) if line]
        parts, characters = duplicate_shares(lines)
        yield "gopher_duplicate_lines", parts, config.max_duplicate_lines, ""
        yield (
            "gopher_duplicate_line_characters",
            characters,
            config.max_duplicate_line_characters,
            "",
        )
        parts, characters = duplicate_shares(
            [part for part in map(str.strip, PARAGRAPH_BREAK.split(text)) if part]
        )
        yield "gopher_duplicate_paragraphs", parts, config.max_duplicate_paragraphs, ""
        yield (
            "gopher_duplicate_paragraph_characters",
            characters,
            config.max_duplicate_paragraph_characters,
            "",
        )
        words = Words.of(text)
        for size, repeated in words.repeated_ngrams(self.longest):
            if size in self.top:
                yield (
                    "gopher_top_ngram",
                    words.share(repeated.commonest(), size),
                    self.top[size],
                    f"{size} words: ",
                )
            if size in self.duplicate:
                yield (
                    "gopher_duplicate_ngrams",
                    words.share(repeated.starts[~repeated.is_first], size),
                    self.duplicate[size],
                    f"{size} words: ",
                )


def duplicate_shares(parts: list[str]) -> tuple[float, float]:
    """Return the share of parts that occur earlier already, and the share of their characters."""
    unique = set(parts)
    if len(unique) == len(parts):
        return 0.0, 0.0
    total = sum(map(len, parts))
    return 1 - len(unique) / len(parts), 1 - sum(map(len, unique)) / total


class RepeatedNgrams(NamedTuple):
    """The n-grams of one length that occur more than once, equal ones next to each other.

    Each group is in the order of the text.

    Attributes:
        starts: int64 [n], the first word.
        groups: int64 [n], ascending from 0, the same for equal ones.
        is_first: bool [n], whether it is the first of its group.
    """

    starts: NDArray[np.int64]
    groups: NDArray[np.int64]
    is_first: NDArray[np.bool_]

    @classmethod
    def of(cls, starts: NDArray[np.int64], keys: NDArray[np.int64]) -> RepeatedNgrams:
        """Group n-grams by their keys, which are the same for equal n-grams.

        ``starts`` and ``keys`` come in the order of the text.
        """
        order = keys.argsort(kind="stable")
        in_order = keys[order]
        again = np.zeros(len(keys) + 1, bool)
        np.equal(in_order[1:], in_order[:-1], out=again[1:-1])
        repeated = again[1:] | again[:-1]
        is_first = ~again[:-1][repeated]
        return cls(starts[order[repeated]], is_first.cumsum() - 1, is_first)

    def commonest(self) -> NDArray[np.int64]:
        """Return the start of the commonest n-gram; on a tie, of the first one in the text."""
        counts = np.bincount(self.groups)
        often = np.flatnonzero(counts == counts.max())
        return self.starts[self.groups == often[self.starts[self.is_first][often].argmin()]]


class Words(NamedTuple):
    """The words of a text.

    Attributes:
        ids: int64 [words], equal for equal words, from 0 on.
        offsets: int64 [words + 1], the characters of all words before.
    """

    ids: NDArray[np.int64]
    offsets: NDArray[np.int64]

    @classmethod
    def of(cls, text: str) -> Words:
        """Return the words of a text, as numbers that are the same for equal words."""
        words = text.split()
        numbers = {word: number for number, word in enumerate(dict.fromkeys(words))}
        offsets = np.zeros(len(words) + 1, np.int64)
        np.cumsum(np.fromiter(map(len, words), np.int64, len(words)), out=offsets[1:])
        return cls(np.fromiter(map(numbers.__getitem__, words), np.int64, len(words)), offsets)

    def repeated_ngrams(self, longest: int) -> Iterator[tuple[int, RepeatedNgrams]]:
        """Yield the repeated n-grams for n = 2 up to ``longest``.

        It ends at the first length without any, because no longer n-gram is repeated then.
        """
        count = len(self.ids)
        found = RepeatedNgrams(np.arange(count), self.ids, np.ones(count, bool))
        for size in range(2, longest + 1):
            inside = found.starts + size <= count
            starts = found.starts[inside]
            # Exact, not a hash: the group of all but the last word, which is below ``count``, and
            # the last word.
            found = RepeatedNgrams.of(
                starts, found.groups[inside] * count + self.ids[starts + size - 1]
            )
            if not found.starts.size:
                return
            yield size, found

    def share(self, starts: NDArray[np.int64], size: int) -> float:
        """Return the share of all characters that the n-grams with these starts cover.

        Each character counts once.
        """
        if not starts.size:
            return 0.0
        starts = np.sort(starts)
        stops = starts + size
        np.minimum(stops[:-1], starts[1:], out=stops[:-1])
        return float((self.offsets[stops] - self.offsets[starts]).sum() / self.offsets[-1])
