"""A SentencePiece ``.model`` as an equal ``tokenizer.json``, where there is one."""

from __future__ import annotations

import logging
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from data_pipeline.tokenizer.agreement import disagreement, torture_texts
from data_pipeline.tokenizer.reference import failure
from data_pipeline.tokenizer.sentencepiece_reference import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    open_model,
)

logger = logging.getLogger(__name__)

META_SPACE = "▁"
BPE = 2


def convert_sentencepiece(content: bytes, origin: str) -> bytes:
    """Return a ``tokenizer.json`` with the ids of a SentencePiece model, or the model itself.

    Both libraries encode the texts of :func:`~data_pipeline.tokenizer.agreement.torture_texts`.
    A model on which they differ, and one of a kind that is known to differ, stays as it is: the
    sentencepiece library encodes its texts then, with one thread about as fast as the tokenizers
    library.

    Raises:
        ConfigError: if the package sentencepiece is missing.
        DataError: if the model is damaged.
    """
    proto, original = open_model(content, origin)
    try:
        if (reason := _unlike_json(proto)) is None:
            converted = _convert(proto)
            if (reason := _difference(original, converted, proto)) is None:
                return bytes(converted.to_str().encode("utf-8"))
    except BaseException as error:  # each library raises its own
        reason = failure(error)
    logger.info(
        "%s stays a SentencePiece model: no tokenizer.json equals it, as %s", origin, reason
    )
    return content


def _unlike_json(proto: Any) -> str | None:
    """Return why :func:`_convert` makes nothing with the ids of a model, if that is known."""
    trainer = proto.trainer_spec
    normalizer = proto.normalizer_spec
    types = {piece.type for piece in proto.pieces}
    if trainer.model_type != BPE:
        # Of two unigram segmentations with the same score, up to rounding, the libraries may take
        # different ones.
        return "only of a BPE model the libraries compute the same"
    if trainer.treat_whitespace_as_suffix or not normalizer.escape_whitespaces:
        return "it does not mark the beginning of words"
    if UNUSED in types:
        return "some of its pieces are switched off"
    if normalizer.precompiled_charsmap:
        # The tokenizers library applies such a map by grapheme, so that sequences like half-width
        # katakana come out otherwise.
        return f"it normalises Unicode by the rule '{normalizer.name}'"
    if USER_DEFINED in types and normalizer.add_dummy_prefix:
        # An added token cuts the text before the blank is put in front.
        return "it has user-defined symbols, and puts a blank before each text"
    return None


def _difference(original: Any, converted: tokenizers.Tokenizer, proto: Any) -> str | None:
    """Return where the ids of hard texts first differ; None if they do not."""
    ordinary = [piece.piece for piece in proto.pieces if piece.type not in (NORMAL, UNUSED)]
    texts = torture_texts(ordinary)
    converted.encode_special_tokens = True
    expected = original.encode(texts)
    found = [
        encoding.ids for encoding in converted.encode_batch_fast(texts, add_special_tokens=False)
    ]
    return disagreement(texts, expected, found)


def _convert(proto: Any) -> tokenizers.Tokenizer:
    normalizer = proto.normalizer_spec
    converted = tokenizers.Tokenizer(_bpe(proto))
    steps: list[normalizers.Normalizer] = []
    if normalizer.remove_extra_whitespaces:
        steps += [
            normalizers.Replace(tokenizers.Regex(r"\A +| +\z"), ""),
            normalizers.Replace(tokenizers.Regex(" {2,}"), " "),
        ]
    if normalizer.add_dummy_prefix:
        steps.append(normalizers.Prepend(META_SPACE))
    converted.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", META_SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if normalizer.add_dummy_prefix else []
    converted.decoder = decoders.Sequence(
        [decoders.Replace(META_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    ordinary = [piece.piece for piece in proto.pieces if piece.type == USER_DEFINED]
    added = [
        piece.piece for piece in proto.pieces if piece.type in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    converted.add_tokens(
        [AddedToken(piece, normalized=False, special=piece not in ordinary) for piece in added]
    )
    return converted


def _bpe(proto: Any) -> models.BPE:
    """Return a BPE model that joins what SentencePiece joins.

    SentencePiece joins the neighbours whose union has the best score; here every pair of pieces
    that makes up a piece is a merge.
    """
    joinable = {
        piece.piece: piece.score for piece in proto.pieces if piece.type in (NORMAL, USER_DEFINED)
    }
    merges = []
    for piece, score in joinable.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in joinable and right in joinable:
                merges.append((-score, -cut, left, right))
    merges.sort()
    return models.BPE(
        vocab={piece.piece: number for number, piece in enumerate(proto.pieces)},
        merges=[(left, right) for _, _, left, right in merges],
        unk_token=_unknown_piece(proto),
        fuse_unk=True,
        byte_fallback=proto.trainer_spec.byte_fallback,
    )


def _unknown_piece(proto: Any) -> str:
    return next(str(piece.piece) for piece in proto.pieces if piece.type == UNKNOWN)
