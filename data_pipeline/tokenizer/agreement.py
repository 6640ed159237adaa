"""Texts on which two tokenizers that should be equal are compared, and where they first differ."""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np

from data_pipeline.tokenizer.patterns import byte_characters

_SURROGATES = range(0xD800, 0xE000)
_BLOCK = 512
_LINES = 64
# Bytes of a token, as characters: ASCII and the first byte of another character, or the last byte
# of one and what begins with ASCII.
_JOINED_BEFORE = re.compile(r"([\x00-\x7f]+)([\x80-\xff])[\x00-\xff]*")
_JOINED_AFTER = re.compile(r"[\x80-\xff]*([\x80-\xff])([\x00-\x7f][\x00-\xff]*)")
_ALPHABETS = (
    "ab 1\n\t\r.,'sS<|>/_",
    "aab  ",
    "\x1c\x85\u00a0\u2003\u2028\u3000\x0b\x0c x.\n",
    "e\u0301\u0308\u0323\u200d\ufe0f👩👧🏽🇩🇪a",
    "٣۴१Ⅷ½²1٫x ",
    "שלום مرحبا \u202e\u200f",
    "中文漢字かなカナ한글각。、 ",
    "ǅßſKİıﬁΣς'ſ'S",
)


def torture_texts(tokens: Iterable[str] = ()) -> list[str]:
    """Return about 100 KB of text on which tokenizers are known to disagree.

    More would take longer than encoding a small corpus.

    Every code point of two bytes, one in 41 of the first two planes and one in 257 of the others,
    runs of blanks, line ends and digits, marks without a base, joined emoji, scripts from the
    right, and ``tokens`` spelled out.
    """
    # A prime step, so that every place in a block of a script comes up.
    points = [
        *range(1, 0x800),
        *(point for point in range(0x800, 0x20000, 41) if point not in _SURROGATES),
        *range(0x20000, 0x110000, 257),
    ]
    texts = [
        "",
        " ",
        "\u0301",
        "\u200d",
        "\ufeffx",
        "a" * 5000,
        "pneumono" * 500,
        "def f(x):\n\treturn x  \n\n\n    y = 1234567.89\r\n\r\n",
    ]
    for start in range(0, len(points), _BLOCK):
        block = [chr(point) for point in points[start : start + _BLOCK]]
        texts += ["".join(block), "  ".join(block[::2])]
    texts += [character * count for character in " \n\t1.é中" for count in (*range(1, 18), 1000)]
    source = random.Random(0)
    texts += [
        "".join(source.choices(alphabet, k=400)) for alphabet in _ALPHABETS for _ in range(16)
    ]
    return texts + [
        text for token in tokens for text in (token, f"before{token}after", f" {token} {token}\n")
    ]


@lru_cache(maxsize=1)
def folding_characters() -> str:
    """Return the characters beyond ASCII that stand for an ASCII letter in another case.

    An expression that ignores case may take them for that letter: ſ for s, the sign of Kelvin for
    k, ligatures for their letters. Engines differ in which.
    """
    return "".join(
        character
        for character in map(chr, range(0x80, 0x10000))
        if any(
            "a" <= letter <= "z"
            for other in (character.casefold(), character.lower(), character.upper())
            if other != character
            for letter in other.lower()
        )
    )


@lru_cache(maxsize=1)
def case_folding_texts() -> list[str]:
    """Return about 10 KB of text with apostrophes before and after :func:`folding_characters`.

    Contractions such as 's and 'LL are where the expressions of tokenizers ignore case.
    """
    characters = folding_characters()
    texts = [
        f"'{each} x'{each} X'{each}x '{each}SS '{each}e '{each.upper()} '{each}{each} "
        f"'r{each} 'V{each} 'l{each}S 'L{each} 1'{each}1 ''{each} '{each}'s '{each}\u0301 "
        f"x{each}'s x{each}'{each}x{each} {each}'Ll"
        for each in characters
    ]
    source = random.Random(0)
    alphabet = ["'"] * 8 + list("sStTrReEvVmMlLdDkK xX1\n" + characters)
    return texts + ["".join(source.choices(alphabet, k=300)) for _ in range(16)]


def newer_unicode_texts(vocabulary: Iterable[str]) -> list[str]:
    """Return texts whose tokens show whether a code point is taken for a letter.

    The vocabulary must be a byte-level one, in the spelling of a ``tokenizer.json``.

    Regular expression engines know different versions of Unicode. That one of them takes a new
    letter for a sign changes tokens only if one reaches from the letter's last byte into the
    text after it, or from the text before it to its first byte.
    """
    bytes_of = str.maketrans(
        {character: chr(value) for value, character in enumerate(byte_characters())}
    )
    # By the first byte of a letter: the smallest of the texts that a token joins to it.
    before: dict[str, str] = {}
    after: dict[str, str] = {}
    for token in vocabulary:
        spelled = token.translate(bytes_of)
        if spelled.isascii():
            continue
        if found := _JOINED_BEFORE.fullmatch(spelled):
            text, byte = found.groups()
            before[byte] = min(text, before.get(byte, text))
        elif found := _JOINED_AFTER.fullmatch(spelled):
            byte, text = found.groups()
            text = text.encode("ascii", "ignore").decode()
            after[byte] = min(text, after.get(byte, text))
    texts = []
    for character in map(chr, (*range(0x80, 0x10000), *range(0x10000, 0x20000, 8))):
        if unicodedata.category(character) == "Cn":
            spelled = character.encode().decode("latin-1")
            texts += [f"x {before[spelled[0]]}{character}"] if spelled[0] in before else []
            texts += [f"{character}{after[spelled[-1]]} x"] if spelled[-1] in after else []
    return ["\n".join(texts[start : start + _LINES]) for start in range(0, len(texts), _LINES)]


def first_difference(expected: np.ndarray, found: np.ndarray) -> int | None:
    """The index of the first token that differs or that only one side has.

    None if both are equal.
    """
    shorter = min(len(expected), len(found))
    differ = np.flatnonzero(expected[:shorter] != found[:shorter])
    if differ.size:
        return int(differ[0])
    return None if len(expected) == len(found) else shorter


def disagreement(
    texts: Sequence[str], expected: Iterable[Sequence[int]], found: Iterable[Sequence[int]]
) -> str | None:
    """Says where token ids of the same texts first differ, or None."""
    for text, one, other in zip(texts, expected, found, strict=True):
        if (position := first_difference(np.asarray(one), np.asarray(other))) is not None:
            return (
                f"token {position} of {excerpt(text)} is {_at(other, position)} instead of"
                f" {_at(one, position)}"
            )
    return None


def excerpt(text: str) -> str:
    """The beginning of a text, in ASCII."""
    return ascii(text[:40]) + ("..." if len(text) > 40 else "")


def _at(ids: Sequence[int], position: int) -> str:
    return str(int(ids[position])) if position < len(ids) else "missing"
