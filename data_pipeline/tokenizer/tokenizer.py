"""A tokenizer: a ``tokenizer.json``, and which of its tokens begin and end a document."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers

from data_pipeline.tokenizer.config import TokenPolicy
from data_pipeline.tokenizer.patterns import cut_before_white_space, may_be_cut
from pretrain.core.errors import DataError

EOD_TOKENS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<｜end▁of▁sentence｜>")
BOS_TOKENS = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "<｜begin▁of▁sentence｜>")
PAD_TOKENS = (
    "<pad>",
    "<|pad|>",
    "[PAD]",
    "<|padding|>",
    "<|finetune_right_pad_id|>",
    "<｜▁pad▁｜>",
)
LARGEST_ID = (1 << 31) - 1


class Tokenizer:
    """A loaded ``tokenizer.json``.

    Every engine is measured against its :meth:`encode`, which is the tokenizers library's.

    Args:
        content: the bytes of the file.
        origin: where it came from, for errors.
        policy: which tokens begin and end a document. Tokens that it leaves out are searched among
            well-known names.

    Attributes:
        content: the file's bytes; ``sha256`` is their checksum.
        reference: the tokenizer of the tokenizers library, in which special tokens spelled in a
            text are ordinary text.
        vocab_size: the largest id + 1.
        eod_id: id of the token that ends a document. A tokenizer without one has its bos_id or else
            its pad_id here, unless the policy appends the end-of-document token.
        bos_id, pad_id: ids of the tokens that begin a document and fill a sequence; None if there
            is none.
        append_eod, prepend_bos: whether those tokens are written around each document.

    Raises:
        DataError: if the bytes are no tokenizer, or it lacks a token that the policy names or
            needs.
    """

    def __init__(self, content: bytes, origin: str, policy: TokenPolicy | None = None) -> None:
        policy = policy or TokenPolicy()
        self.content = content
        self.origin = origin
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.reference = _read(content, origin)
        vocabulary = self.reference.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        if not 0 < self.vocab_size <= LARGEST_ID:
            raise DataError(
                f"{origin} has no tokens, or ids of 2^31 and more: give a tokenizer with a"
                " vocabulary"
            )
        eod_id = self._find("eod_token", policy.eod_token, EOD_TOKENS)
        self.bos_id = self._find("bos_token", policy.bos_token, BOS_TOKENS)
        self.pad_id = self._find("pad_token", policy.pad_token, PAD_TOKENS)
        self.append_eod = policy.append_eod
        self.prepend_bos = policy.prepend_bos
        if self.prepend_bos and self.bos_id is None:
            raise DataError(
                f"{origin} has none of the tokens {', '.join(BOS_TOKENS)}: name the one that begins"
                " a document with bos_token"
            )
        candidates = [eod_id] if self.append_eod else [eod_id, self.bos_id, self.pad_id]
        found = [token for token in candidates if token is not None]
        if not found:
            raise DataError(
                f"{origin} has no end-of-document token: name it with eod_token, or use a tokenizer"
                f" with one of {', '.join(EOD_TOKENS)}"
            )
        self.eod_id = found[0]
        self._may_be_cut = may_be_cut(self.reference)

    def _find(self, field: str, wanted: str | None, known: Sequence[str]) -> int | None:
        """Return the id of the token that the policy names, or of the first well-known one."""
        if wanted is None:
            return next(
                (found for token in known if (found := self.token_id(token)) is not None), None
            )
        if (found := self.token_id(wanted)) is None:
            added = [token.content for token in self.reference.get_added_tokens_decoder().values()]
            near = difflib.get_close_matches(
                wanted, added or list(self.reference.get_vocab()), n=3, cutoff=0.3
            )
            hint = f", but {', '.join(near)}" if near else ""
            raise DataError(f"{self.origin} has no token '{wanted}'{hint}: correct {field}")
        return found

    def token_id(self, token: str) -> int | None:
        """The id of a vocabulary entry; None if there is no such entry."""
        found: int | None = self.reference.token_to_id(token)
        return found

    def pieces(self, text: str) -> Iterator[str]:
        """Yield parts of a long text that encode to the same tokens as the whole.

        They allow parallel work in bounded memory.
        """
        return cut_before_white_space(text) if self._may_be_cut else iter([text])

    def encode(self, texts: Sequence[str]) -> list[np.ndarray[tuple[int], np.dtype[np.int64]]]:
        """Token ids [n] int64 of each text, on all cores, without special tokens."""
        pieces = [list(self.pieces(text)) for text in texts]
        encodings = iter(
            self.reference.encode_batch_fast(
                [piece for parts in pieces for piece in parts], add_special_tokens=False
            )
        )
        return [
            np.concatenate([np.array(next(encodings).ids, dtype=np.int64) for _ in parts])
            for parts in pieces
        ]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; special tokens are spelled out."""
        return str(self.reference.decode(list(ids), skip_special_tokens=False))


def load_tokenizer(path: Path, policy: TokenPolicy | None = None) -> Tokenizer:
    """Reads a ``tokenizer.json``.

    Raises:
        DataError: if it is missing, unreadable, or lacks a token that the policy names or needs.
    """
    return Tokenizer(read_file(path, "a tokenizer.json"), str(path), policy)


def read_file(path: Path, expected: str) -> bytes:
    """The bytes of a file, or a DataError that says what was expected there."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"the tokenizer {path} cannot be read: {error.strerror}; give the path of {expected}"
        ) from None


def failure(error: BaseException) -> str:
    """Return the report of a native library on one line; a panic of Rust code counts.

    What is not the library's failure, such as an interrupt, is raised again.
    """
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error
    return " ".join(str(error).split())[:300] or type(error).__name__


def _read(content: bytes, origin: str) -> tokenizers.Tokenizer:
    try:
        library = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
    except BaseException as error:
        # The library raises bare Exception, and its panics are only BaseException.
        raise DataError(
            f"{origin} is not a tokenizer that the tokenizers library can read ({failure(error)}):"
            " give a tokenizer.json"
        ) from None
    library.no_truncation()
    library.no_padding()
    # A text that spells out a special token must not end its document there.
    library.encode_special_tokens = True
    return library
