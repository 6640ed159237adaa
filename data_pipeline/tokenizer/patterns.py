"""The regular expressions that cut text into words before byte-level BPE.

They also decide at which places a long text may be cut without changing a word.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Literal

import tokenizers
from tokenizers import pre_tokenizers

from pretrain.core.files import JsonObject

PIECE_CHARACTERS = 1 << 17

Digits = Literal["as_words", "single", "triples"]
WhiteSpace = Literal["gpt2", "runs"]

_DIGITS: dict[Digits, str] = {"as_words": r" ?\p{N}+", "single": r"\p{N}", "triples": r"\p{N}{1,3}"}
_WORDS: dict[WhiteSpace, str] = {
    # GPT-2 (Radford et al. 2019), openai/gpt-2 encoder.py.
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|{digits}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    # cl100k_base of tiktoken, in the spelling of Llama 3's tokenizer.json: line ends close a word,
    # and the indentation after them is its own.
    "runs": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|{digits}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}


def word_pattern(digits: Digits, whitespace: WhiteSpace) -> str:
    """The expression of a trained tokenizer, in the syntax of the tokenizers library."""
    return _WORDS[whitespace].replace("{digits}", _DIGITS[digits])


_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = [
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*",
]
_CASED_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K = rf"{_CASED[0]}{_CONTRACTION}|{_CASED[1]}{_CONTRACTION}|\p{{N}}{{1,3}}|{_CASED_TAIL}"

# tiktoken_ext/openai_public.py, without possessive quantifiers and $, which the tokenizers
# library's regular expressions read differently.
TIKTOKEN_PATTERNS = {
    "gpt2": word_pattern("as_words", "gpt2"),
    "r50k_base": word_pattern("as_words", "gpt2"),
    "p50k_base": word_pattern("as_words", "gpt2"),
    "p50k_edit": word_pattern("as_words", "gpt2"),
    "cl100k_base": word_pattern("triples", "runs"),
    "o200k_base": _O200K,
    "o200k_harmony": _O200K,
}
TEKKEN_PATTERN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_CASED_TAIL}"

_CUTTABLE = {
    *TIKTOKEN_PATTERNS.values(),
    TEKKEN_PATTERN,
    *(word_pattern(digits, whitespace) for digits in _DIGITS for whitespace in _WORDS),
}

# In none of the expressions above a word reaches from a visible character to a blank after it, or
# from a letter or digit to any white space, and none looks beyond such a place. What Python calls
# visible (\S) all regular expression engines do.
_SAFE_CUT = re.compile(r"(?<=\S)(?=[ \t])|(?<=[A-Za-z0-9])(?=[\r\n])")


def pre_tokenizer(pattern: str) -> pre_tokenizers.PreTokenizer:
    """Cuts text by ``pattern`` and writes each byte as a character, as GPT-2 does.

    GPT-2's own pattern has a faster form.
    """
    if pattern == word_pattern("as_words", "gpt2"):
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def byte_characters() -> list[str]:
    """Return the character for each byte in a ``tokenizer.json`` (Radford et al. 2019).

    It is the byte's own character if that is visible.
    """
    visible = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    rest = (value for value in range(256) if value not in visible)
    characters = {value: chr(value) for value in visible} | {
        value: chr(256 + number) for number, value in enumerate(rest)
    }
    assert set(characters.values()) == set(pre_tokenizers.ByteLevel.alphabet())
    return [characters[value] for value in range(256)]


def pattern_of(pre: pre_tokenizers.PreTokenizer | None) -> str | None:
    """The expression of what :func:`pre_tokenizer` made or equals.

    None for any other pre-tokenizer.
    """
    state: JsonObject = json.loads(pre.__getstate__()) if pre is not None else {}
    if state.get("type") == "ByteLevel" and state["use_regex"] and not state["add_prefix_space"]:
        return word_pattern("as_words", "gpt2")
    match state.get("pretokenizers"):
        case [
            {
                "type": "Split",
                "pattern": {"Regex": str(pattern)},
                "behavior": "Isolated",
                "invert": False,
            },
            {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False},
        ]:
            return pattern
    return None


def is_byte_level(pre: pre_tokenizers.PreTokenizer | None) -> bool:
    """Whether a pre-tokenizer writes each byte as one of :func:`byte_characters`."""
    state: JsonObject = json.loads(pre.__getstate__()) if pre is not None else {}
    return any(part.get("type") == "ByteLevel" for part in state.get("pretokenizers", [state]))


def _cuts_digits_first(pre: pre_tokenizers.PreTokenizer | None) -> bool:
    """Whether a pre-tokenizer is StarCoder2's: GPT-2's between single digits."""
    state: JsonObject = json.loads(pre.__getstate__()) if pre is not None else {}
    match state.get("pretokenizers"):
        case [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False},
        ]:
            return True
    return False


def may_be_cut(library: tokenizers.Tokenizer) -> bool:
    """Whether parts of :func:`cut_before_white_space` encode to the tokens of the whole."""
    return (
        library.normalizer is None
        and (
            pattern_of(library.pre_tokenizer) in _CUTTABLE
            or _cuts_digits_first(library.pre_tokenizer)
        )
        # Added tokens that are not special are still found in texts, and could reach across a cut.
        and all(token.special for token in library.get_added_tokens_decoder().values())
    )


def cut_before_white_space(text: str) -> Iterator[str]:
    """Yield parts of about ``PIECE_CHARACTERS`` characters with the same words as the whole.

    That holds for every pattern of this module.
    """
    start = 0
    while len(text) - start > PIECE_CHARACTERS and (
        cut := _SAFE_CUT.search(text, start + PIECE_CHARACTERS)
    ):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]
