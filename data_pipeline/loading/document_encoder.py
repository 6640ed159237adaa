"""From documents to tokens during training, with the engine that is fastest on the first ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from data_pipeline.config import DataConfig
from data_pipeline.loading.document_groups import Text
from data_pipeline.tokenizer.engine_choice import CheckedEncoder, choose_engine
from data_pipeline.tokenizer.fill_in_the_middle import open_transform
from data_pipeline.tokenizer.tokenizer import Tokenizer

# Choosing an engine takes seconds: once a process for each tokenizer, by its checksum and policy.
_chosen: dict[tuple[str, bool], str] = {}


class DocumentEncoder:
    """Encodes the documents of one source as a build would."""

    def __init__(self, data: DataConfig, name: str, tokenizer: Tokenizer) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self._encoder: CheckedEncoder | None = None
        self._transform = open_transform(data.fill_in_the_middle, name, tokenizer)

    def encode(self, batch: Sequence[Text]) -> Iterator[np.ndarray]:
        """Yield the tokens of each document: int64."""
        documents = [self._segments(text) for text in batch]
        pieces = [
            (piece, text)
            for text, document in zip(batch, documents, strict=True)
            for piece in document
            if isinstance(piece, str)
        ]
        ids, offsets = self._open_encoder(batch).encode_flat(
            [piece for piece, _ in pieces],
            [text.digest for _, text in pieces],
            [f"{self.name} {text.origin}" for _, text in pieces],
        )
        # ``offsets`` begins with 0 and ends with the number of ids, which are no cuts.
        encoded = iter(np.split(ids.astype(np.int64), offsets[1:-1]))
        for document in documents:
            parts = [
                next(encoded) if isinstance(piece, str) else np.array([piece]) for piece in document
            ]
            yield np.concatenate(parts)

    def _segments(self, text: Text) -> list[str | int]:
        """A document as texts to encode, and literal token ids around and between them.

        Texts are cut if the tokenizer allows it, so that a long one is encoded on all cores.
        """
        tokenizer = self.tokenizer
        segments: list[str | int] = []
        if tokenizer.prepend_bos and tokenizer.bos_id is not None:
            segments.append(tokenizer.bos_id)
        transformed = (
            self._transform.split(text.content, text.digest, 0) if self._transform else None
        )
        for part in transformed or [text.content]:
            segments += [part] if isinstance(part, int) else tokenizer.pieces(part)
        if tokenizer.append_eod and tokenizer.eod_id is not None:
            segments.append(tokenizer.eod_id)
        return segments

    def _open_encoder(self, batch: Sequence[Text]) -> CheckedEncoder:
        """The encoder, chosen by the first batch: it is a sample of what is to come."""
        if self._encoder is None:
            key = self.tokenizer.sha256, self.tokenizer.parse_special_tokens
            if key not in _chosen:
                sample = [text.content for text in batch]
                _chosen[key] = choose_engine(self.tokenizer, sample).name
            self._encoder = CheckedEncoder(self.tokenizer, _chosen[key])
        return self._encoder
