"""Libraries that encode the same tokenizer at different speeds, behind one interface."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import tokenizers

from data_pipeline.tokenizer.agreement import folding_characters
from data_pipeline.tokenizer.patterns import byte_characters, is_byte_level, pattern_of
from data_pipeline.tokenizer.reference import TokenizersReference, failure
from data_pipeline.tokenizer.tokenizer import Tokenizer
from pretrain.core.errors import ConfigError
from pretrain.core.files import JsonObject

Ids = np.ndarray[tuple[int], np.dtype[np.uint32]]
Offsets = np.ndarray[tuple[int], np.dtype[np.int64]]


class EngineUnavailableError(ConfigError):
    """An engine that is not installed or cannot hold a tokenizer.

    Attributes:
        reason: why, without what to do about it.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(
            f"the engine {name} cannot be used with this tokenizer, as {reason}: leave --engine"
            " out, or name another one"
        )
        self.reason = reason


class Engine(Protocol):
    """One library with one tokenizer in it."""

    def encode_flat(self, texts: Sequence[str]) -> tuple[Ids, Offsets]:
        """Encodes texts; a special token in one is ordinary text unless the policy parses them.

        Returns:
            The ids of all texts back to back [num_tokens] uint32, and where each text's ids begin
            and the last one's end [num_texts + 1] int64.
        """


class _Reference:
    """The library that the tokenizer's file was made for."""

    name: str

    def __init__(self, tokenizer: Tokenizer) -> None:
        if tokenizer.reference.engine != self.name:
            raise ValueError(f"it is a file of the {tokenizer.reference.engine} library")
        self._tokenizer = tokenizer

    def encode_flat(self, texts: Sequence[str]) -> tuple[Ids, Offsets]:
        return _joined([ids.astype(np.uint32) for ids in self._tokenizer.encode(texts)])


class _Tokenizers(_Reference):
    name = "tokenizers"


class _SentencePiece(_Reference):
    name = "sentencepiece"


class _Fastokens:
    def __init__(self, tokenizer: Tokenizer) -> None:
        from fastokens import Tokenizer as Native

        self._native = Native.from_json_str(json.dumps(_with_every_byte(tokenizer)))
        self._split = not tokenizer.parse_special_tokens

    def encode_flat(self, texts: Sequence[str]) -> tuple[Ids, Offsets]:
        ids, offsets = self._native.encode_batch_flat(list(texts), split_special_tokens=self._split)
        return np.frombuffer(ids, dtype="<u4"), np.frombuffer(offsets, dtype="<u8").astype(np.int64)


class _Gigatoken:
    def __init__(self, tokenizer: Tokenizer) -> None:
        from gigatoken import Tokenizer as Native

        content = _with_every_byte(tokenizer)
        # It finds every special token that it knows of, so it must not know of them.
        content["added_tokens"] = [
            token
            for token in content["added_tokens"]
            if tokenizer.parse_special_tokens or not token["special"]
        ]
        self._native = Native.from_json(json.dumps(content))

    def encode_flat(self, texts: Sequence[str]) -> tuple[Ids, Offsets]:
        layout = self._native.encode_batch(list(texts)).layout
        offsets = np.asarray(layout.offsets.data, dtype=np.int64)
        return (
            np.asarray(layout.content.data, dtype=np.uint32)[offsets[0] : offsets[-1]],
            offsets - offsets[0],
        )


class _Tiktoken:
    """Merges in their order are ranks, which a table maps back to ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        from tiktoken import Encoding

        if tokenizer.parse_special_tokens:
            raise ValueError("it does not parse special tokens")
        library = _library(tokenizer)
        model = _with_every_byte(tokenizer)["model"]
        pattern = pattern_of(library.pre_tokenizer)
        if model["type"] != "BPE" or pattern is None or library.normalizer is not None:
            raise ValueError("it is not a byte-level BPE with one pattern")
        bytes_of = {character: bytes([value]) for value, character in enumerate(byte_characters())}
        vocabulary: dict[str, int] = model["vocab"]
        names = dict.fromkeys([*byte_characters(), *("".join(pair) for pair in model["merges"])])
        if model["ignore_merges"]:
            added = tokenizer.reference.added_tokens
            names |= dict.fromkeys(name for name in vocabulary if name not in added)
        self._ids = np.array([vocabulary[name] for name in names], dtype=np.uint32)
        ranks = {
            b"".join([bytes_of[character] for character in name]): rank
            for rank, name in enumerate(names)
        }
        self._encoding = Encoding(
            tokenizer.origin, pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
        )

    def encode_flat(self, texts: Sequence[str]) -> tuple[Ids, Offsets]:
        ranks, offsets = _joined(
            [self._encoding.encode_to_numpy(text, disallowed_special=()) for text in texts]
        )
        return self._ids[ranks], offsets


class _WithReference:
    """A fast engine that leaves texts with known differences to the reference.

    Two kinds are known. Of bytes that have no token in a byte-level vocabulary, such as 0xf1 in
    that of StarCoder2 (Lozhkov et al. 2024), the tokenizers library makes nothing, and joins what
    is around them; the fast engines refuse such a vocabulary, so that they get one with additional
    ids, which show the texts with these bytes. And in contractions that ignore case, fastokens
    takes no ſ for an s.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer) -> None:
        self._engine = engine
        self._tokenizer = tokenizer

    def encode_flat(self, texts: Sequence[str]) -> tuple[Ids, Offsets]:
        ids, offsets = self._engine.encode_flat(texts)
        again = {
            number
            for number, text in enumerate(texts)
            if not text.isascii() and _FOLDED_CONTRACTION.search(text)
        }
        if ids.size and ids.max() >= self._tokenizer.vocab_size:
            places = np.flatnonzero(ids >= self._tokenizer.vocab_size)
            # Texts without tokens begin where the next one does; the last of these has the token.
            again.update((np.searchsorted(offsets, places, side="right") - 1).tolist())
        if not again:
            return ids, offsets
        rows = np.split(ids, offsets[1:-1])
        numbers = sorted(again)
        exact = self._tokenizer.encode([texts[number] for number in numbers])
        for number, row in zip(numbers, exact, strict=True):
            rows[number] = row.astype(np.uint32)
        return _joined(rows)


# Characters beyond ASCII that are a single ASCII letter if case is ignored, in the place of the
# letters of 's, 'll and such.
_FOLDED = "".join(each for each in folding_characters() if each.casefold().isascii())
_FOLDED_CONTRACTION = re.compile(f"'[A-Za-z]?[{re.escape(_FOLDED)}]")


def _library(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    if not isinstance(tokenizer.reference, TokenizersReference):
        raise ValueError("it is a SentencePiece model")
    return tokenizer.reference.backend


def _with_every_byte(tokenizer: Tokenizer) -> JsonObject:
    """Return the ``tokenizer.json`` with an id for every byte of a byte-level vocabulary.

    Additional ids are beyond all others.
    """
    library = _library(tokenizer)
    content: JsonObject = json.loads(library.to_str())
    if content["model"]["type"] == "BPE" and is_byte_level(library.pre_tokenizer):
        vocabulary = content["model"]["vocab"]
        missing = [each for each in byte_characters() if each not in vocabulary]
        vocabulary |= {each: tokenizer.vocab_size + number for number, each in enumerate(missing)}
    return content


_ENGINES: dict[str, Callable[[Tokenizer], Engine]] = {
    "fastokens": _Fastokens,
    "gigatoken": _Gigatoken,
    "tiktoken": _Tiktoken,
    "sentencepiece": _SentencePiece,
    "tokenizers": _Tokenizers,
}
ENGINE_NAMES = tuple(_ENGINES)


def open_engine(name: str, tokenizer: Tokenizer) -> Engine:
    """An engine with this tokenizer in it.

    That their ids are equal is for :mod:`~data_pipeline.tokenizer.engine_choice` to find out.

    Raises:
        EngineUnavailableError: if its package is missing or cannot read the tokenizer.
        ConfigError: for a name that is no engine's.
    """
    if name not in _ENGINES:
        near = difflib.get_close_matches(name, ENGINE_NAMES, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(
            f"there is no engine '{name}': {hint}take one of {', '.join(ENGINE_NAMES)}"
        )
    try:
        engine = _ENGINES[name](tokenizer)
    except ModuleNotFoundError as error:
        raise EngineUnavailableError(name, f"the package {error.name} is not installed") from None
    except BaseException as error:  # each library raises its own
        raise EngineUnavailableError(
            name, f"it cannot read the tokenizer ({failure(error)})"
        ) from None
    return engine if name == tokenizer.reference.engine else _WithReference(engine, tokenizer)


def _joined(rows: Sequence[np.ndarray[Any, np.dtype[np.uint32]]]) -> tuple[Ids, Offsets]:
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    return np.concatenate([np.zeros(0, np.uint32), *rows]), offsets
