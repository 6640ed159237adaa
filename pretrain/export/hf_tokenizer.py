"""The tokenizer of a Hugging Face folder, in a class of transformers that gives its ids."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.tokenizer.agreement import case_folding_texts, disagreement, torture_texts
from data_pipeline.tokenizer.files import JSON_NAME, MODEL_NAME, tokenizer_file
from data_pipeline.tokenizer.reference import failure
from data_pipeline.tokenizer.sentencepiece_reference import SentencePieceReference
from data_pipeline.tokenizer.tokenizer import Tokenizer
from pretrain.checkpoint.tokenizer_files import TOKENIZER_CONFIG
from pretrain.core.errors import CheckpointError, DataError
from pretrain.core.files import JsonObject
from pretrain.export.hf_open import open_tokenizer
from pretrain.export.writer import read_json_object, write_json_file

logger = logging.getLogger(__name__)

# Classes that leave everything to the sentencepiece library, with the file that each reads; the
# first is that of transformers 5.
SENTENCEPIECE_CLASSES = {
    "SentencePieceBackend": MODEL_NAME,
    "BertGenerationTokenizer": "spiece.model",
}


def write_tokenizer(folder: Path, tokenizer: Tokenizer, max_tokens: int) -> str | None:
    """Write the tokenizer and its ``tokenizer_config.json`` beside a ``config.json``.

    A SentencePiece model gets the first class that gives its ids on hard texts.

    Returns:
        If the ids of transformers differ, where, in a sentence; else None.
    """
    fields: JsonObject = {
        # Without a class AutoTokenizer takes the model type's own one, with its own pre-tokenizer.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_tokens,
        # Otherwise decoding removes spaces before punctuation, and does not return the text.
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.eod_id is not None:
        eod_token = tokenizer.decode([tokenizer.eod_id])
        fields |= {"eos_token": eod_token, "bos_token": eod_token}
    if tokenizer.reference.file_name == JSON_NAME:
        (folder / JSON_NAME).write_bytes(tokenizer.content)
        write_json_file(folder / TOKENIZER_CONFIG, fields)
        return None
    (folder / MODEL_NAME).write_bytes(tokenizer.content)
    fields["unk_token"] = tokenizer.reference.unknown_token
    differences = {}
    for name, file in SENTENCEPIECE_CLASSES.items():
        (folder / file).write_bytes(tokenizer.content)
        write_json_file(folder / TOKENIZER_CONFIG, {**fields, "tokenizer_class": name})
        if (difference := _difference(folder, tokenizer)) is None:
            return None
        differences[name] = difference
        if file != MODEL_NAME:
            (folder / file).unlink()
    first, difference = next(iter(differences.items()))
    write_json_file(folder / TOKENIZER_CONFIG, {**fields, "tokenizer_class": first})
    note = (
        f"no class of the installed transformers gives the tokenizer's ids ({first}: {difference}):"
        f" encode texts with the sentencepiece library and {MODEL_NAME}"
    )
    logger.warning("%s", note)
    return note


class TokenIds(NamedTuple):
    """What a model says of its vocabulary: its size, and ids that may be unknown or several."""

    vocab_size: int
    bos_token_id: Any
    eos_token_id: Any
    pad_token_id: Any


def source_tokenizer(folder: Path) -> Path | None:
    """Return the tokenizer of a folder that has the ids of transformers; None if there is none.

    A SentencePiece model has them in the classes that an export names; others change its tokens.
    """
    path = tokenizer_file(folder)
    if path.name == MODEL_NAME:
        config = folder / TOKENIZER_CONFIG
        named = read_json_object(config).get("tokenizer_class") if config.is_file() else None
        return path if named in SENTENCEPIECE_CLASSES else None
    return path if path.is_file() else None


def sentencepiece_section(model: Path, output: Path, config: TokenIds) -> JsonObject:
    """Return the section of a recipe for such a model, whose copy is in ``output``.

    Raises:
        CheckpointError: if it is damaged, or has more entries than the model.
    """
    try:
        reference = SentencePieceReference(model.read_bytes(), str(model), False)
    except DataError as error:
        raise CheckpointError(str(error)) from None
    if (size := len(reference.vocabulary)) > config.vocab_size:
        raise CheckpointError(
            f"{model} has {size} entries, and the model a vocab_size of {config.vocab_size}: copy"
            " its own there"
        )
    spelled = {number: token for token, number in reference.special_tokens.items()}
    ends = config.eos_token_id
    end = spelled.get(ends[0] if isinstance(ends, list) else ends)
    # As it is: the checkpoint has this file, and kind "sentencepiece" might convert it to another.
    section = {"kind": "file", "path": str(output / MODEL_NAME)}
    return section | ({"eod_token": end} if end is not None else {})


def _difference(folder: Path, tokenizer: Tokenizer) -> str | None:
    """Return where the ids of transformers first differ; None if they do not.

    Texts that spell out a special token are left out: transformers parses them.
    """
    spelled = list(tokenizer.reference.added_tokens)
    texts = [
        text
        for text in [*torture_texts(), *case_folding_texts()]
        if not any(token in text for token in spelled)
    ]
    try:
        opened: Any = open_tokenizer(folder)
        found = [opened(text, add_special_tokens=False)["input_ids"] for text in texts]
    except Exception as error:  # whatever a class raises about a file that it cannot read
        return failure(error)
    return disagreement(texts, [row.tolist() for row in tokenizer.encode(texts)], found)
