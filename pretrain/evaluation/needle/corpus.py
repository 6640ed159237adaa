"""A synthetic corpus that teaches recall: a model of a few 100,000 parameters learns it in minutes.

A document is a row of filler words with pairs among them: a key with its value (associative recall,
Arora et al. 2023). Each key has a value of its own in each document, so that only the document says
which one, and every pair but the first of a key is a question that the model can answer. Documents
have the same number of tokens: a window of training as long as one holds exactly that one.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from pretrain.evaluation.needle.forms import PAIR_KEYS, PAIR_VALUES

FILLER_WORDS = tuple(f"w{number}" for number in range(32))
END, UNKNOWN = "<|endoftext|>", "<unk>"
# Zipf's law: the n-th word is 1/n as frequent as the first one.
FILLER_WEIGHTS = tuple(accumulate(1 / rank for rank in range(1, len(FILLER_WORDS) + 1)))


@dataclass(frozen=True)
class Documents:
    """Documents of one length.

    Attributes:
        tokens: of each document, the one that ends it included.
        pair_share: of the words, those in pairs.
        new_share: chance that a pair has a new key, as long as there are any.
        max_keys: of one document. The rest is for needles: they take a key that no word near
            them has.
    """

    tokens: int
    pair_share: float = 0.5
    new_share: float = 0.25
    max_keys: int = 64

    def words(self, source: random.Random) -> list[str]:
        """The words of one document, one fewer than it has tokens."""
        # A pair has two words, a word of filler is one.
        pair_chance = self.pair_share / (2 - self.pair_share)
        keys = iter(source.sample(PAIR_KEYS, self.max_keys))
        values: dict[str, str] = {}
        # From the key that was not said for longest to the last one.
        said: list[str] = []
        words: list[str] = []
        while len(words) < self.tokens - 1:
            if len(words) == self.tokens - 2 or source.random() >= pair_chance:
                words += source.choices(FILLER_WORDS, cum_weights=FILLER_WEIGHTS)
                continue
            key = None
            if not said or source.random() < self.new_share:
                key = next(keys, None)
            if key is None:
                # Log-uniform in how many keys were said since: near and far ones alike. Near ones
                # are learned first, and far ones from them.
                key = said.pop(-int(len(said) ** source.random()))
            else:
                values[key] = source.choice(PAIR_VALUES)
            said.append(key)
            words += [key, values[key]]
        return words


def documents(kind: Documents, count: int, seed: int) -> Iterator[str]:
    """Texts; document i depends on the seed and on i alone."""
    for number in range(count):
        yield " ".join(kind.words(random.Random(f"{seed} {kind.tokens} {number}")))


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
