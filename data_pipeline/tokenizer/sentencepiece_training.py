"""Training of a SentencePiece model."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator

from data_pipeline.tokenizer.config import TrainSentencePiece
from data_pipeline.tokenizer.reference import failure
from data_pipeline.tokenizer.tokenizer import Tokenizer
from pretrain.core.errors import ConfigError, DataError

# SentencePiece leaves longer lines out of its training.
LONGEST_LINE_BYTES = 4096


def train_sentencepiece(texts: Iterable[str], config: TrainSentencePiece) -> Tokenizer:
    """Trains a unigram model (Kudo 2018) or BPE with the sentencepiece library.

    The ids from 0 are those of the unknown piece, the tokens that begin and end a document, the
    padding token if it is named, the reserved ones, the user-defined symbols, and the bytes with
    ``byte_fallback``. One thread trains, as the scores depend on their number: the same texts give
    the same file, byte for byte. A small corpus may have fewer than ``vocab_size`` entries to give.

    Raises:
        ConfigError: if the package sentencepiece is missing, or ``vocab_size`` does not fit the
            texts.
        DataError: if there is no text.
    """
    try:
        import sentencepiece
    except ImportError as error:
        raise ConfigError(
            f"data.tokenizer of kind train_sentencepiece needs the package {error.name}: pip"
            " install sentencepiece protobuf"
        ) from None
    lines = _Lines(texts)
    model = io.BytesIO()
    keeps_blanks = config.normalization == "identity"
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type=config.model_type,
            vocab_size=config.vocab_size,
            hard_vocab_limit=False,
            character_coverage=config.character_coverage,
            byte_fallback=config.byte_fallback,
            split_digits=config.split_digits,
            add_dummy_prefix=config.dummy_prefix,
            normalization_rule_name=config.normalization,
            remove_extra_whitespaces=not keeps_blanks,
            allow_whitespace_only_pieces=keeps_blanks,
            control_symbols=config.reserved_tokens,
            user_defined_symbols=config.user_defined_symbols,
            unk_piece=config.unk_token,
            bos_piece=config.bos_token,
            eos_piece=config.eod_token,
            pad_piece=config.pad_token or "<pad>",
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1 if config.pad_token is None else 3,
            max_sentence_length=LONGEST_LINE_BYTES + 1,
            num_threads=1,
            minloglevel=2,
        )
    except Exception as error:
        if not lines.count:
            raise DataError(
                "the sample for the tokenizer holds no text: raise data.tokenizer.sample_bytes, or"
                " give files with text in them"
            ) from None
        raise ConfigError(
            f"the sentencepiece library cannot train data.tokenizer ({failure(error)}): change its"
            " vocab_size, or give more text"
        ) from None
    return Tokenizer(model.getvalue(), "the trained tokenizer", config)


class _Lines:
    """The lines of texts, long ones in parts; ``count`` is how many were read."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = texts
        self.count = 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            # Only at line ends, as SentencePiece does in a file. It takes no NUL.
            for line in text.replace("\0", " ").split("\n"):
                for start in range(0, len(line), LONGEST_LINE_BYTES // 4):
                    self.count += 1
                    yield line[start : start + LONGEST_LINE_BYTES // 4]
