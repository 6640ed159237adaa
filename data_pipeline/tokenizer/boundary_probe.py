"""A vocabulary that shows where a pre-tokenizer cuts words, whatever the tokenizer's own one is."""

from __future__ import annotations

import json
import random
from itertools import product

from data_pipeline.tokenizer.agreement import folding_characters
from data_pipeline.tokenizer.config import TokenPolicy
from data_pipeline.tokenizer.patterns import byte_characters, is_byte_level
from data_pipeline.tokenizer.reference import TokenizersReference
from data_pipeline.tokenizer.tokenizer import Tokenizer

_LETTERS = "'stremvdlkSTREMVDLKxX1"


def boundary_probe(tokenizer: Tokenizer) -> Tokenizer | None:
    """Return a tokenizer that cuts as this one does, and joins any two characters of a word.

    A cut at another place gives it other ids, for which a vocabulary of natural texts may need one
    that is hardly ever seen. The characters are ASCII letters and
    :func:`~data_pipeline.tokenizer.agreement.folding_characters`. None if the tokenizer is not a
    byte-level one.
    """
    reference = tokenizer.reference
    if not (
        isinstance(reference, TokenizersReference)
        and is_byte_level(reference.backend.pre_tokenizer)
    ):
        return None
    spelling = byte_characters()
    vocabulary = {character: number for number, character in enumerate(spelling)}
    merges: list[tuple[str, str]] = []

    def join(left: str, right: str) -> None:
        if left + right not in vocabulary:
            vocabulary[left + right] = len(vocabulary)
            merges.append((left, right))

    characters = [
        "".join(spelling[byte] for byte in character.encode())
        for character in _LETTERS + folding_characters()
    ]
    for character in characters:
        for end in range(1, len(character)):
            join(character[:end], character[end])
    pairs = list(product(characters, repeat=2))
    # In any plain order a pair would join before or behind a cut each time, which hides it.
    random.Random(0).shuffle(pairs)
    for left, right in pairs:
        join(left, right)
    content = json.loads(reference.backend.to_str())
    content |= {
        "added_tokens": [],
        "post_processor": None,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges},
    }
    return Tokenizer(
        json.dumps(content).encode(),
        f"the pre-tokenizer of {tokenizer.origin}",
        TokenPolicy(append_eod=False),
    )
