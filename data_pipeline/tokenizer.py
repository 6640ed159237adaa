"""Byte-level BPE: trained from a corpus, or loaded from a ``tokenizer.json``."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from pretrain.config.errors import DataError

EOD_TOKEN = "<|endoftext|>"
EOD_TOKENS = (EOD_TOKEN, "</s>", "<eos>", "<|end_of_text|>")
PIECE_CHARACTERS = 1 << 17

# No word of GPT-2's pre-tokenizer reaches from a visible character into white space after it, so a cut between them changes no token.
_SAFE_CUT = re.compile(r"(?<=\S)(?=[ \t\r\n])")


class Tokenizer:
    """A loaded ``tokenizer.json``.

    Attributes:
        content: the file's bytes; ``sha256`` is their checksum.
        vocab_size: the largest id + 1.
        eod_id: id of the token that ends a document.

    Raises:
        DataError: where the bytes are no tokenizer, or it has no token that could end a document.
    """

    def __init__(self, content: bytes, origin: str) -> None:
        self.content = content
        self.sha256 = hashlib.sha256(content).hexdigest()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        except Exception as error:  # the library raises bare Exception
            reason = " ".join(str(error).split())
            raise DataError(f"{origin} is not a tokenizer that the tokenizers library can read ({reason}): give a tokenizer.json") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # A text that spells out a special token must not end its document there.
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        found = [vocabulary[token] for token in EOD_TOKENS if token in vocabulary]
        if not found:
            raise DataError(f"{origin} has no end-of-document token: it needs one of {', '.join(EOD_TOKENS)}")
        self.eod_id = found[0]
        self.vocab_size = max(vocabulary.values()) + 1
        self._splits_at_white_space = _is_plain_byte_level(json.loads(content))

    def pieces(self, text: str) -> Iterator[str]:
        """Parts of a long text that encode to the same tokens as the whole, for parallelism and bounded memory."""
        return cut_before_white_space(text) if self._splits_at_white_space else iter([text])

    def encode(self, texts: Sequence[str]) -> list[np.ndarray[tuple[int], np.dtype[np.int64]]]:
        """Token ids [n] int64 of each text, on all cores, without special tokens."""
        return [np.array(encoding.ids, dtype=np.int64) for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; special tokens are spelled out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))


def cut_before_white_space(text: str) -> Iterator[str]:
    """Parts of about ``PIECE_CHARACTERS`` characters in which GPT-2's pre-tokenizer finds the same words as in the whole."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS and (cut := _SAFE_CUT.search(text, start + PIECE_CHARACTERS)):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE (Sennrich et al. 2016; over bytes: Radford et al. 2019) with the end-of-document token as id 0.

    All 256 bytes are in the vocabulary, so any text round-trips. The same texts give the same file, byte for byte. A small corpus may
    have fewer than ``vocab_size`` entries to give. Long texts take less memory in the pieces of :func:`cut_before_white_space`.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[EOD_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return Tokenizer(tokenizer.to_str(pretty=True).encode("utf-8"), "the trained tokenizer")


def load_tokenizer(path: Path) -> Tokenizer:
    """Reads a ``tokenizer.json``.

    Raises:
        DataError: where it is missing, unreadable, or has no end-of-document token.
    """
    try:
        return Tokenizer(path.read_bytes(), str(path))
    except OSError as error:
        raise DataError(f"the tokenizer {path} cannot be read: {error.strerror}; give the path of a tokenizer.json") from None


def _is_plain_byte_level(content: dict[str, Any]) -> bool:
    """Whether the tokenizer splits words as GPT-2's does, so that a text may be cut before white space."""
    pre_tokenizer = content.get("pre_tokenizer") or {}
    return (
        content.get("normalizer") is None
        and pre_tokenizer.get("type") == "ByteLevel"
        and pre_tokenizer.get("use_regex") is True
        and pre_tokenizer.get("add_prefix_space") is False
        # Added tokens that are not special are still found in texts, and could reach across a cut.
        and all(token["special"] for token in content.get("added_tokens", []))
    )
