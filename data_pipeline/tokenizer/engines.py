"""Libraries that encode the same tokenizer at different speeds, behind one interface."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from data_pipeline.tokenizer.patterns import byte_characters, pattern_of
from data_pipeline.tokenizer.tokenizer import Tokenizer, failure
from pretrain.core.errors import ConfigError

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
            " out, or say --engine tokenizers"
        )
        self.reason = reason


class Engine(Protocol):
    """One library with one tokenizer in it."""

    def encode_flat(self, texts: Sequence[str]) -> tuple[Ids, Offsets]:
        """Encodes texts; a special token that a text spells out is ordinary text.

        Returns:
            The ids of all texts back to back [num_tokens] uint32, and where each text's ids begin
            and the last one's end [num_texts + 1] int64.
        """


class _Tokenizers:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode_flat(self, texts: Sequence[str]) -> tuple[Ids, Offsets]:
        return _joined([ids.astype(np.uint32) for ids in self._tokenizer.encode(texts)])


class _Fastokens:
    def __init__(self, tokenizer: Tokenizer) -> None:
        from fastokens import Tokenizer as Native

        self._native = Native.from_json_str(tokenizer.reference.to_str())

    def encode_flat(self, texts: Sequence[str]) -> tuple[Ids, Offsets]:
        ids, offsets = self._native.encode_batch_flat(list(texts), split_special_tokens=True)
        return np.frombuffer(ids, dtype="<u4"), np.frombuffer(offsets, dtype="<u8").astype(np.int64)


class _Gigatoken:
    def __init__(self, tokenizer: Tokenizer) -> None:
        from gigatoken import Tokenizer as Native

        content = json.loads(tokenizer.reference.to_str())
        # It finds every special token that it knows of, so it must not know of them.
        content["added_tokens"] = [
            token for token in content["added_tokens"] if not token["special"]
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

        library = tokenizer.reference
        model = json.loads(tokenizer.reference.to_str())["model"]
        pattern = pattern_of(library.pre_tokenizer)
        if model["type"] != "BPE" or pattern is None or library.normalizer is not None:
            raise ValueError("it is not a byte-level BPE with one pattern")
        bytes_of = {character: bytes([value]) for value, character in enumerate(byte_characters())}
        vocabulary: dict[str, int] = model["vocab"]
        names = dict.fromkeys([*byte_characters(), *("".join(pair) for pair in model["merges"])])
        if model["ignore_merges"]:
            special = {token.content for token in library.get_added_tokens_decoder().values()}
            names |= dict.fromkeys(name for name in vocabulary if name not in special)
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


_ENGINES: dict[str, Callable[[Tokenizer], Engine]] = {
    "fastokens": _Fastokens,
    "gigatoken": _Gigatoken,
    "tiktoken": _Tiktoken,
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
        return _ENGINES[name](tokenizer)
    except ModuleNotFoundError as error:
        raise EngineUnavailableError(name, f"the package {error.name} is not installed") from None
    except BaseException as error:  # each library raises its own
        raise EngineUnavailableError(
            name, f"it cannot read the tokenizer ({failure(error)})"
        ) from None


def _joined(rows: Sequence[np.ndarray[Any, np.dtype[np.uint32]]]) -> tuple[Ids, Offsets]:
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    return np.concatenate([np.zeros(0, np.uint32), *rows]), offsets
