"""Drops training documents that share a long n-gram with an evaluation set.

Brown et al. 2020, appendix C.

There as here words are in lower case and without punctuation. GPT-3 cut out the passage around a
match and kept the rest of the document; here the document goes as a whole.
"""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline.cleaning.config import Decontaminate
from data_pipeline.cleaning.ngrams import hash_ngrams, hash_words, words_of
from data_pipeline.cleaning.stage import Cleaned
from data_pipeline.sources.config import JsonlSource, TextSource
from data_pipeline.sources.interface import LeftOut, ReadContext
from data_pipeline.sources.jsonl import Jsonl
from data_pipeline.sources.text import Text
from pretrain.core.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

MAX_RECORD_BYTES = 1 << 30


class EvaluationNgrams(NamedTuple):
    """The n-grams of all evaluation files.

    Attributes:
        hashes: uint64 [n], ascending, each once.
        files: int64 [n], the first file that holds it, a place in ``names``.
        names: paths.
    """

    hashes: NDArray[np.uint64]
    files: NDArray[np.int64]
    names: tuple[str, ...]


class Decontaminator:
    """Looks for the n-grams of the evaluation sets in ``against``.

    A .txt file is one text, a .jsonl file one text a line; either may be .gz or .zst.

    The files are read once a process. Texts shorter than an n-gram cannot be found; a warning
    counts them.

    Raises:
        ConfigError: for a file that is not there, of another kind, or without a single n-gram.
        DataError: for a file that cannot be read.
    """

    def __init__(self, config: Decontaminate) -> None:
        self.size = config.ngram_words
        self.known = load_ngrams(_list_files(config.against), config.text_field, config.ngram_words)

    def __call__(self, text: str) -> Cleaned:
        known = self.known.hashes
        words = words_of(text)
        hashes = hash_ngrams(hash_words(words), self.size)
        places = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
        found = np.flatnonzero(known[places] == hashes)
        if not found.size:
            return Cleaned(text)
        first = int(found[0])
        ngram = b" ".join(words[first : first + self.size]).decode("utf-8")
        name = self.known.names[self.known.files[places[first]]]
        return Cleaned(
            text,
            "contaminated",
            f"{found.size} n-grams of {self.size} words are in {name} too, the first:"
            f" {ngram[:200]}",
        )


def _list_files(patterns: list[str]) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for pattern in patterns:
        path = os.path.expanduser(pattern)
        matches = (
            [path]
            if os.path.isfile(path)
            else sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
        )
        if not matches:
            raise ConfigError(
                f"data.cleaning.decontaminate.against: {pattern} matches no file: check the path or"
                " the pattern"
            )
        found |= dict.fromkeys(matches)
    return tuple(found)


@lru_cache(maxsize=4)
def load_ngrams(paths: tuple[str, ...], text_field: str, size: int) -> EvaluationNgrams:
    """The n-grams of evaluation files, kept for the process."""
    hashes: list[NDArray[np.uint64]] = []
    files: list[NDArray[np.int64]] = []
    for number, path in enumerate(paths):
        texts = [hash_ngrams(hash_words(words_of(text)), size) for text in _texts(path, text_field)]
        short = sum(not ngrams.size for ngrams in texts)
        if short:
            logger.warning(
                "%s: %d of %d texts are shorter than %d words: copies of them are not found",
                path,
                short,
                len(texts),
                size,
            )
        hashes += texts
        files += [np.full(len(ngrams), number) for ngrams in texts]
    unique, first = np.unique(np.concatenate(hashes), return_index=True)
    if not unique.size:
        raise ConfigError(
            f"data.cleaning.decontaminate.against: no text in {', '.join(paths)} has {size} words:"
            " name other files or lower ngram_words"
        )
    return EvaluationNgrams(unique, np.concatenate(files)[first], paths)


def _texts(path: str, text_field: str) -> Iterator[str]:
    context = ReadContext("evaluation", MAX_RECORD_BYTES)
    source: Jsonl | Text
    match path.removesuffix(".gz").removesuffix(".zst").rpartition(".")[2]:
        case "txt":
            source = Text(TextSource(kind="text", input=[path]), context)
        case "jsonl":
            source = Jsonl(JsonlSource(kind="jsonl", input=[path], text_field=text_field), context)
        case _:
            raise ConfigError(
                f"data.cleaning.decontaminate.against: {path} is neither .txt nor .jsonl (plain,"
                " .gz or .zst): convert it"
            )
    for unit in source.units(unit_bytes=1 << 62):
        for document in source.read(unit):
            if isinstance(document, LeftOut):
                place = f"{path}, line {document.line}" if document.line else path
                raise DataError(
                    f"{place}: {document.reason} {document.detail}".rstrip()
                    + ": fix the evaluation file, so that nothing of it is missed"
                )
            yield document.text
