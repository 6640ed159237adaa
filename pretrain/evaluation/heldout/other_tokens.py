"""A held-out text in the tokens of another model, as much of it as is scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tokenizers
from tqdm import tqdm

from data_pipeline.tokenizer.files import MODEL_NAME
from pretrain.evaluation.generation.generators import TransformersGenerator
from pretrain.evaluation.heldout.text import HeldoutText, TokensInMemory, document_decoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokens encoded behind a window: where the text was cut, its last ones are not those of the whole
# text.
MARGIN = 16
# What changes nothing of the tokens of a plain text.
AROUND_TEXT = ("post_processor", "truncation", "padding")


def in_tokens_of(
    model: TransformersGenerator, text: HeldoutText, window: int, max_windows: int | None
) -> HeldoutText:
    """The text in the tokens of ``model``, each document with its own start and end tokens.

    With the tokenizer of the data it is ``text`` itself. With another one, ``max_windows`` are
    taken out of the split before they are encoded, from places spread evenly over it; without that
    number, or if the split is hardly longer, everything is encoded and stands in memory.
    """
    assert text.datasets is not None
    policy = text.datasets.tokenizer
    same_ends = (
        policy.append_eod
        and policy.eod_id == model.eod_id
        and ([policy.bos_id] if policy.prepend_bos else []) == model.bos_ids
    )
    if same_ends and _same_tokenizer(model, text.datasets.tokenizer_path):
        return text
    sample = None if max_windows is None else sampled_again(text, model, window, max_windows)
    return sample or encoded_again(text, model)


def _same_tokenizer(model: TransformersGenerator, path: Path) -> bool:
    """Whether the tokenizer makes the same tokens of every text as that of the data."""
    theirs = getattr(model.tokenizer, "backend_tokenizer", None)
    if path.name.endswith(MODEL_NAME):
        return theirs is None and _model_of(model.tokenizer) == path.read_bytes()
    if theirs is None:
        return False
    contents = [
        json.loads(tokenizer.to_str())
        for tokenizer in (theirs, tokenizers.Tokenizer.from_file(str(path)))
    ]
    first, second = (
        {part: value for part, value in content.items() if part not in AROUND_TEXT}
        for content in contents
    )
    return first == second


def _model_of(tokenizer: PreTrainedTokenizerBase) -> bytes | None:
    """Return the SentencePiece model in a tokenizer of transformers; None if it has none."""
    processor = getattr(tokenizer, "sp_model", None)
    return None if processor is None else bytes(processor.serialized_model_proto())


def encoded_again(text: HeldoutText, model: TransformersGenerator) -> HeldoutText:
    """All documents in the model's tokens, in memory."""
    documents = [
        np.array([*model.bos_ids, *model.encode(document), model.eod_id], dtype=np.int64)
        for document in text.texts()
    ]
    stream = TokensInMemory(documents, model.vocab_size)
    return HeldoutText(
        stream,
        stream.document_starts(0, stream.num_tokens),
        text.sources,
        text.source_D,
        text.utf8_bytes,
        text.texts,
    )


def sampled_again(
    text: HeldoutText, model: TransformersGenerator, window: int, max_windows: int
) -> HeldoutText | None:
    """One section of ``window`` + 1 of the model's tokens from each of ``max_windows`` places.

    None if they would run into each other.

    Lengths of documents are those in the data's tokens.
    """
    # Evenly spread, without random numbers: two models are scored at the same places.
    places = np.arange(max_windows) * text.stream.num_tokens // max_windows
    room = text.stream.num_tokens // max_windows
    parts: list[np.ndarray] = []
    documents: list[int] = []
    encoder = _SectionEncoder(text, model)
    for place in tqdm(places.tolist(), desc="encoding windows", unit="window"):
        section = encoder.section(place, window + 1, room)
        if section is None:
            return None
        parts += [part for _, part in section]
        documents += [document for document, _ in section]
    stream = TokensInMemory(parts, model.vocab_size)
    starts = stream.document_starts(0, stream.num_tokens)
    lengths_D = text.lengths_D()[documents]
    source_D = text.source_D[documents]
    return HeldoutText(
        stream,
        starts,
        text.sources,
        source_D,
        text.utf8_bytes,
        text.texts,
        None,
        window + 1,
        lengths_D,
    )


class _SectionEncoder:
    """Encodes parts of a text."""

    def __init__(self, text: HeldoutText, model: TransformersGenerator) -> None:
        assert text.datasets is not None
        self.text = text
        self.model = model
        self.decode = document_decoder(text.datasets)

    def section(self, place: int, wanted: int, room: int) -> list[tuple[int, np.ndarray]] | None:
        """``wanted`` tokens of the model, from a ``place`` of the data, and each part's document.

        None if ``room`` tokens of the data are too few for that.
        """
        taken = min(wanted + MARGIN, room)
        while True:
            parts = self._encoded(place, taken)
            if sum(len(part) for _, part in parts) >= wanted + MARGIN:
                break
            if taken == room:
                return None
            # How many tokens of the data make ``wanted`` of the model is known only afterwards.
            taken = min(2 * taken, room)
        # The margin is dropped again: its last tokens depend on where the text was cut.
        cut: list[tuple[int, np.ndarray]] = []
        for document, part in parts:
            kept = part[: wanted - sum(len(earlier) for _, earlier in cut)]
            if len(kept):
                cut.append((document, kept))
        return cut

    def _encoded(self, place: int, count: int) -> list[tuple[int, np.ndarray]]:
        """The parts of documents in ``count`` tokens of the data; complete ones have an end."""
        stream = self.text.stream
        starts_D = self.text.starts_D
        first = int(np.searchsorted(starts_D, place, side="right")) - 1
        last = int(np.searchsorted(starts_D, place + count, side="left"))
        ids = stream.read(place, count)
        parts = []
        for document in range(first, last):
            begin = max(int(starts_D[document]), place)
            end = int(starts_D[document + 1]) if document + 1 < len(starts_D) else stream.num_tokens
            decoded = self.decode(ids[begin - place : end - place])
            if begin > starts_D[document]:
                decoded = decoded.lstrip("\ufffd")  # of a character that was cut
            opened = self.model.bos_ids if begin == starts_D[document] else []
            closed = [self.model.eod_id] if end <= place + count else []
            parts.append(
                (
                    document,
                    np.array([*opened, *self.model.encode(decoded), *closed], dtype=np.int64),
                )
            )
        return parts
