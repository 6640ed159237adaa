"""The tokenizers inside the package mistral-common, as equal ``tokenizer.json`` files."""

from __future__ import annotations

import difflib
import json
from importlib.resources import files
from pathlib import Path

from data_pipeline.tokenizer.reference import failure
from data_pipeline.tokenizer.sentencepiece_model import convert_sentencepiece
from data_pipeline.tokenizer.tiktoken_ranks import convert_ranks
from pretrain.core.errors import ConfigError, DataError


def convert_mistral(name: str) -> bytes:
    """Return a ``tokenizer.json`` of a file in mistral_common/data.

    A tekken file has ranks as tiktoken's, after the special tokens; the others are SentencePiece
    models.

    Raises:
        ConfigError: if mistral-common is missing, or has no such file.
        DataError: if the file is damaged, or no equal ``tokenizer.json`` is known.
    """
    try:
        folder = files("mistral_common") / "data"
    except ImportError:
        raise ConfigError(
            "data.tokenizer of kind mistral needs the package mistral-common: pip install"
            " mistral-common"
        ) from None
    names = sorted(
        entry.name
        for entry in folder.iterdir()
        if entry.name.startswith("tekken") or ".model" in entry.name
    )
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.3)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(
            f"data.tokenizer.name: mistral-common has no tokenizer '{name}': {hint}it has"
            f" {', '.join(names)}"
        )
    origin = f"mistral-common's {name}"
    if name.startswith("tekken"):
        return _convert_tekken(str(folder / name), origin)
    return convert_sentencepiece((folder / name).read_bytes(), origin)


def _convert_tekken(path: str, origin: str) -> bytes:
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    try:
        tekken = Tekkenizer.from_file(path)
        special_tokens = {
            tekken.id_to_piece(number): number for number in range(tekken.num_special_tokens)
        }
        ids = range(tekken.num_special_tokens, tekken.n_words)
        ranks = {
            tekken.id_to_byte_piece(number): number - tekken.num_special_tokens for number in ids
        }
        pattern = json.loads(Path(path).read_bytes())["config"]["pattern"]
    except Exception as error:
        raise DataError(
            f"{origin} cannot be read ({failure(error)}): reinstall mistral-common"
        ) from None
    return convert_ranks(ranks, origin, pattern, special_tokens, first_id=tekken.num_special_tokens)
