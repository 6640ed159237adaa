"""A synthetic corpus that teaches recall, for models of a few 100,000 parameters.

A document is a row of filler words with pairs among them: a key with its value (associative recall,
Arora et al. 2023). Each key has a value of its own in each document, so that only the document says
which one, and every pair but the first of a key is a question. Documents have few keys or many: the
few are asked for again soon, which is learned first, the many after a long while. All documents
have the same number of tokens: a window of training that is as long is exactly one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pretrain.evaluation.needle.forms import PAIR_KEYS, PAIR_VALUES

FILLER_WORDS = tuple(f"w{number}" for number in range(32))
END, UNKNOWN = "<|endoftext|>", "<unk>"


def zipf(count: int) -> np.ndarray:
    """Zipf's law: the n-th of so many is 1/n as frequent as the first one; probabilities, fp64."""
    shares = 1 / np.arange(1, count + 1)
    return shares / shares.sum()


@dataclass(frozen=True)
class Documents:
    """Documents of one length.

    Attributes:
        tokens: of each document, the one that ends it included.
        pair_share: of the words, those in pairs.
        max_keys: of one document; the logarithm of their number is drawn evenly, from 2 on. The
            rest is for needles: they take a key that no word near them has.
    """

    tokens: int
    pair_share: float = 0.8
    max_keys: int = 16

    def words(self, source: np.random.Generator) -> list[str]:
        """The words of one document, one fewer than it has tokens."""
        fewest, share = min(2, self.max_keys), source.random()
        count = math.floor(fewest ** (1 - share) * self.max_keys**share)
        keys = source.permutation(len(PAIR_KEYS))[:count].tolist()
        values = source.integers(len(PAIR_VALUES), size=count).tolist()
        # Drawn at once for all places, which is far faster than one by one.
        fillers = source.choice(len(FILLER_WORDS), self.tokens, p=zipf(len(FILLER_WORDS)))
        chosen = source.integers(count, size=self.tokens)
        # A pair has two words, a word of filler is one.
        is_pair = source.random(self.tokens) < self.pair_share / (2 - self.pair_share)
        words: list[str] = []
        for filler, pair, wants_pair in zip(fillers, chosen, is_pair, strict=True):
            room = self.tokens - 1 - len(words)
            if room >= 2 and wants_pair:
                words += [PAIR_KEYS[keys[pair]], PAIR_VALUES[values[pair]]]
            elif room:
                words.append(FILLER_WORDS[filler])
        return words


def documents(kind: Documents, count: int, seed: int) -> Iterator[str]:
    """Texts; document i depends on the seed and on i alone."""
    for number in range(count):
        yield " ".join(kind.words(np.random.default_rng((seed, kind.tokens, number))))


def tokenizer_json() -> str:
    """A ``tokenizer.json`` with one token for each word of the corpus."""
    words = (END, UNKNOWN, *FILLER_WORDS, *PAIR_KEYS, *PAIR_VALUES)
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": 0, "content": END, "special": True, **special}],
            "normalizer": None,
            "pre_tokenizer": {"type": "WhitespaceSplit"},
            "post_processor": None,
            "decoder": None,
            "model": {
                "type": "WordLevel",
                "vocab": {word: number for number, word in enumerate(words)},
                "unk_token": UNKNOWN,
            },
        },
        indent=1,
    )
