"""A SentencePiece ``.model`` as an equal ``tokenizer.json``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from data_pipeline.tokenizer.agreement import disagreement, torture_texts
from data_pipeline.tokenizer.tokenizer import failure
from pretrain.core.errors import ConfigError, DataError

META_SPACE = "▁"
UNIGRAM = 1
BPE = 2
NORMAL = 1
UNKNOWN = 2
CONTROL = 3
USER_DEFINED = 4
UNUSED = 5
SCORE_TOLERANCE = 1e-5


def convert_sentencepiece(content: bytes, origin: str) -> bytes:
    """Return a ``tokenizer.json`` with the ids of a SentencePiece model (Kudo & Richardson 2018).

    The model's kind is BPE or unigram.

    Both libraries encode the texts of :func:`~data_pipeline.tokenizer.agreement.torture_texts`, and
    a model on which they differ is refused. Two differences are known and accepted. Control symbols
    become special tokens, and so do user-defined symbols of a model that puts a blank before each
    text: spelled in a text they are ordinary text. And of two unigram segmentations with the same
    score, up to rounding, the libraries may take different ones.

    Raises:
        ConfigError: if the package sentencepiece is missing.
        DataError: if the model is damaged, or has no equal ``tokenizer.json``.
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
        original = sentencepiece.SentencePieceProcessor(model_proto=content)
        _check_kind(proto, origin)
        converted = _convert(proto)
    except DataError:
        raise
    except BaseException as error:  # each library raises its own
        raise DataError(
            f"{origin} is not a SentencePiece model that can be read ({failure(error)}): give an"
            " undamaged .model"
        ) from None
    _check_equal(original, converted, proto, origin)
    return bytes(converted.to_str().encode("utf-8"))


def _check_kind(proto: Any, origin: str) -> None:
    trainer = proto.trainer_spec
    normalizer = proto.normalizer_spec
    if (
        trainer.model_type not in (UNIGRAM, BPE)
        or trainer.treat_whitespace_as_suffix
        or not normalizer.escape_whitespaces
    ):
        raise DataError(
            f"{origin} has no equal tokenizer.json: only models of type BPE and unigram that mark"
            " the beginning of words do"
        )
    if any(piece.type == UNUSED for piece in proto.pieces):
        raise DataError(
            f"{origin} has no equal tokenizer.json, as some of its pieces are switched off: use the"
            " model before that"
        )
    if normalizer.precompiled_charsmap:
        # The tokenizers library applies such a map by grapheme, so that sequences like half-width
        # katakana come out otherwise.
        raise DataError(
            f"{origin} has no equal tokenizer.json, as it normalises Unicode by the rule"
            f" '{normalizer.name}': use a model trained with normalization_rule_name=identity, and"
            " data.cleaning.normalize"
        )


def _check_equal(original: Any, converted: tokenizers.Tokenizer, proto: Any, origin: str) -> None:
    is_ordinary = {
        token.content: not token.special for token in converted.get_added_tokens_decoder().values()
    }
    spelled = [
        piece.piece
        for piece in proto.pieces
        if piece.type not in (NORMAL, USER_DEFINED) or is_ordinary.get(piece.piece)
    ]
    texts = torture_texts(spelled)
    converted.encode_special_tokens = True
    expected = original.encode(texts)
    found = [
        encoding.ids for encoding in converted.encode_batch_fast(texts, add_special_tokens=False)
    ]
    if proto.trainer_spec.model_type == UNIGRAM:
        found = [
            one if one != other and _is_as_good(proto, one, other) else other
            for one, other in zip(expected, found, strict=True)
        ]
    if where := disagreement(texts, expected, found):
        raise DataError(
            f"{origin} has no equal tokenizer.json, as {where}: use a tokenizer.json made for it,"
            " or another tokenizer"
        )


def _is_as_good(proto: Any, one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two segmentations hold the same text and the same score up to rounding."""

    def text(ids: Sequence[int]) -> str:
        return "".join(proto.pieces[number].piece for number in ids)

    def score(ids: Sequence[int]) -> float:
        return sum(proto.pieces[number].score for number in ids)

    return text(one) == text(other) and abs(score(one) - score(other)) <= SCORE_TOLERANCE * (
        1 + abs(score(one))
    )


def _convert(proto: Any) -> tokenizers.Tokenizer:
    normalizer = proto.normalizer_spec
    converted = tokenizers.Tokenizer(
        _bpe(proto) if proto.trainer_spec.model_type == BPE else _unigram(proto)
    )
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
    # An added token cuts the text before the blank is put in front, so that symbols that are found
    # in a text would take it with them.
    ordinary = [
        piece.piece
        for piece in proto.pieces
        if piece.type == USER_DEFINED and not normalizer.add_dummy_prefix
    ]
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


def _unigram(proto: Any) -> models.Unigram:
    """Return a unigram model with SentencePiece's segmentations.

    The tokenizers library would find any entry in a text: those that SentencePiece does not look
    for get a score that never wins.
    """
    lowest = min(piece.score for piece in proto.pieces if piece.type == NORMAL)
    others = lowest * max(len(piece.piece) for piece in proto.pieces) - 1
    scores = [
        (piece.piece, piece.score if piece.type == NORMAL else others) for piece in proto.pieces
    ]
    unknown = [piece for piece, _ in scores].index(_unknown_piece(proto))
    return models.Unigram(scores, unk_id=unknown, byte_fallback=proto.trainer_spec.byte_fallback)


def _unknown_piece(proto: Any) -> str:
    return next(str(piece.piece) for piece in proto.pieces if piece.type == UNKNOWN)
