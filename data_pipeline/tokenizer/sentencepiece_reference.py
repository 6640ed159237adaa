"""A SentencePiece ``.model`` in its own library."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from data_pipeline.tokenizer.files import MODEL_NAME
from data_pipeline.tokenizer.reference import failure
from pretrain.core.errors import ConfigError, DataError

NORMAL = 1
UNKNOWN = 2
CONTROL = 3
USER_DEFINED = 4
UNUSED = 5


def open_model(content: bytes, origin: str) -> tuple[Any, Any]:
    """Return the fields of a model (``ModelProto``) and the library that has read it.

    Raises:
        ConfigError: if a package is missing.
        DataError: if the model is damaged.
    """
    try:
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise ConfigError(
            f"{origin} needs the package {error.name}: pip install sentencepiece protobuf"
        ) from None
    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(content)
        processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        if not any(piece.type == UNKNOWN for piece in proto.pieces):
            raise ValueError("it has no unknown piece")
    except BaseException as error:  # each library raises its own
        raise DataError(
            f"{origin} is not a SentencePiece model that can be read ({failure(error)}): give an"
            " undamaged .model"
        ) from None
    return proto, processor


class SentencePieceReference:
    """A model in the sentencepiece library (Kudo & Richardson 2018).

    Control symbols are its special tokens. Where they are parsed, what is between them is
    encoded as texts of its own.
    """

    engine = "sentencepiece"
    file_name = MODEL_NAME

    def __init__(self, content: bytes, origin: str, parse_special_tokens: bool) -> None:
        proto, self._processor = open_model(content, origin)
        self.vocabulary = {piece.piece: number for number, piece in enumerate(proto.pieces)}
        control = [piece.piece for piece in proto.pieces if piece.type == CONTROL]
        self.special_tokens = {piece: self.vocabulary[piece] for piece in control}
        self.added_tokens = {
            piece.piece: number
            for number, piece in enumerate(proto.pieces)
            if piece.type in (UNKNOWN, CONTROL, USER_DEFINED)
        }
        self.unknown_token: str | None = str(self._processor.id_to_piece(self._processor.unk_id()))
        self.end_id = _id(self._processor.eos_id())
        self.begin_id = _id(self._processor.bos_id())
        self.pad_id = _id(self._processor.pad_id())
        self._ids = {number: piece for piece, number in self.special_tokens.items()}
        # The longest first, where one begins like another.
        longest = sorted(control, key=len, reverse=True)
        self._spelled = (
            re.compile("(" + "|".join(map(re.escape, longest)) + ")")
            if parse_special_tokens and control
            else None
        )

    def pieces(self, text: str) -> Iterator[str]:
        """See :meth:`~data_pipeline.tokenizer.reference.Reference.pieces`."""
        return iter([text])

    def segmented(self, text: str) -> str:
        """See :meth:`~data_pipeline.tokenizer.reference.Reference.segmented`."""
        return str(self._processor.normalize(text))

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """See :meth:`~data_pipeline.tokenizer.reference.Reference.encode`."""
        if self._spelled is None:
            return self._encode(list(texts))
        # Every second part is a special token.
        parts = [self._spelled.split(text) for text in texts]
        rows = iter(self._encode([part for row in parts for part in row[::2]]))
        return [
            [
                number
                for place, part in enumerate(row)
                for number in ([self.special_tokens[part]] if place % 2 else next(rows))
            ]
            for row in parts
        ]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        # Workers of a build have one thread each, which they say as they do to the other engines.
        threads = int(os.environ.get("RAYON_NUM_THREADS") or -1)
        found: list[list[int]] = self._processor.encode(texts, num_threads=threads)
        return found

    def decode(self, rows: Sequence[Sequence[int]], skip_special_tokens: bool) -> list[str]:
        """See :meth:`~data_pipeline.tokenizer.reference.Reference.decode`."""
        return ["".join(self._texts(row, skip_special_tokens)) for row in rows]

    def _texts(self, row: Sequence[int], skip_special_tokens: bool) -> Iterator[str]:
        """Yield the texts between special tokens, and these as they are spelled."""
        size = len(self._processor)
        waiting: list[int] = []
        for number in row:
            if (special := self._ids.get(number)) is None:
                # A model may have more entries than its tokenizer.
                if 0 <= number < size:
                    waiting.append(int(number))
            elif not skip_special_tokens:
                yield self._processor.decode(waiting)
                yield special
                waiting = []
        yield self._processor.decode(waiting)


def _id(number: int) -> int | None:
    return number if number >= 0 else None
