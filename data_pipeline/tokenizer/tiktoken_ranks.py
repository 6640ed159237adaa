"""A tiktoken vocabulary, tokens as bytes with ranks, as an equal ``tokenizer.json``."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping

import tokenizers
from tokenizers import AddedToken, decoders, models

from data_pipeline.tokenizer.agreement import disagreement, excerpt, torture_texts
from data_pipeline.tokenizer.patterns import TIKTOKEN_PATTERNS, byte_characters, pre_tokenizer
from data_pipeline.tokenizer.reference import failure
from data_pipeline.tokenizer.tokenizer import LARGEST_ID
from pretrain.core.errors import ConfigError, DataError


def convert_tiktoken(
    content: bytes, origin: str, pattern: str, special_tokens: Mapping[str, int]
) -> bytes:
    """Return a ``tokenizer.json`` of a tiktoken vocabulary file.

    Its lines are a base64 token and the token's rank, which is its id.

    Args:
        content: the file.
        origin: where it came from, for errors.
        pattern: the regular expression that cuts text into words, or the name of a tiktoken
            encoding that has it.
        special_tokens: their ids.

    Raises:
        ConfigError: if the package tiktoken is missing.
        DataError: if the file is damaged, or no equal ``tokenizer.json`` is known.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise DataError(
                f"{origin}, line {number}: {excerpt(line.decode('latin-1'))} is no base64 token and"
                " rank: give an undamaged tiktoken vocabulary"
            ) from None
    return convert_ranks(ranks, origin, TIKTOKEN_PATTERNS.get(pattern, pattern), special_tokens)


def convert_ranks(
    ranks: Mapping[bytes, int],
    origin: str,
    pattern: str,
    special_tokens: Mapping[str, int],
    first_id: int = 0,
) -> bytes:
    """A ``tokenizer.json`` in which a token has the id ``first_id`` + its rank.

    tiktoken joins the neighbours whose union has the lowest rank, so every pair of tokens that
    makes up a token becomes a merge. Both libraries encode the texts of
    :func:`~data_pipeline.tokenizer.agreement.torture_texts`, and a vocabulary on which they differ
    is refused.

    Raises:
        ConfigError: if the package tiktoken is missing.
        DataError: if the ranks are no vocabulary, or no equal ``tokenizer.json`` is known.
    """
    try:
        import tiktoken
    except ImportError:
        raise ConfigError(f"{origin} needs the package tiktoken: pip install tiktoken") from None
    names = _check_vocabulary(ranks, origin, special_tokens, first_id)
    try:
        original = tiktoken.Encoding(
            origin, pat_str=pattern, mergeable_ranks=dict(ranks), special_tokens={}
        )
        converted = tokenizers.Tokenizer(_model(ranks, names, special_tokens, first_id))
        converted.pre_tokenizer = pre_tokenizer(pattern)
        converted.decoder = decoders.ByteLevel()
        converted.add_special_tokens(
            [AddedToken(token, normalized=False, special=True) for token in special_tokens]
        )
        texts = torture_texts(special_tokens)
        converted.encode_special_tokens = True
        expected = [[first_id + rank for rank in original.encode_ordinary(text)] for text in texts]
        found = [
            encoding.ids
            for encoding in converted.encode_batch_fast(texts, add_special_tokens=False)
        ]
    except BaseException as error:  # each library raises its own, down to panics
        raise DataError(
            f"{origin} cannot be used as a tokenizer ({failure(error)}): check its pattern and its"
            " special tokens"
        ) from None
    if where := disagreement(texts, expected, found):
        raise DataError(
            f"{origin} has no equal tokenizer.json, as {where}: name its pattern by a tiktoken"
            " encoding, or use a tokenizer.json"
        )
    return bytes(converted.to_str().encode("utf-8"))


def _check_vocabulary(
    ranks: Mapping[bytes, int], origin: str, special_tokens: Mapping[str, int], first_id: int
) -> dict[bytes, str]:
    """Return how a ``tokenizer.json`` spells each token, after a check that all ids differ."""
    if missing := [value for value in range(256) if bytes([value]) not in ranks]:
        raise DataError(
            f"{origin} has no token for the byte {missing[0]}: give a complete tiktoken vocabulary"
        )
    ids = [first_id + rank for rank in ranks.values()] + list(special_tokens.values())
    if len(set(ids)) < len(ids) or min(ids) < 0 or max(ids) >= LARGEST_ID:
        raise DataError(
            f"{origin} gives an id to two tokens, or one outside 0 to 2^31: correct the ranks or"
            " special_tokens"
        )
    spelling = byte_characters()
    names = {token: "".join([spelling[value] for value in token]) for token in ranks}
    if clash := set(special_tokens) & set(names.values()):
        raise DataError(
            f"{origin} has '{min(clash)}' as an ordinary token, so it cannot be a special one:"
            " leave it out of special_tokens"
        )
    return names


def _model(
    ranks: Mapping[bytes, int],
    names: Mapping[bytes, str],
    special_tokens: Mapping[str, int],
    first_id: int,
) -> models.BPE:
    merges: list[tuple[str, str]] = []
    for token in sorted(ranks, key=ranks.__getitem__):
        for cut in range(len(token) - 1, 0, -1):
            left, right = token[:cut], token[cut:]
            if left in ranks and right in ranks:
                merges.append((names[left], names[right]))
    vocabulary = {name: first_id + ranks[token] for token, name in names.items()}
    # tiktoken looks a whole word up before it joins anything.
    return models.BPE(vocab=vocabulary | dict(special_tokens), merges=merges, ignore_merges=True)
