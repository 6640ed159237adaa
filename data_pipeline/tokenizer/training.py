"""Training of a byte-level BPE tokenizer."""

from __future__ import annotations

from collections.abc import Iterable

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from data_pipeline.tokenizer.config import TrainBPE
from data_pipeline.tokenizer.patterns import pre_tokenizer, word_pattern
from data_pipeline.tokenizer.tokenizer import Tokenizer


def train_bpe(texts: Iterable[str], config: TrainBPE) -> Tokenizer:
    """Trains a byte-level BPE (Sennrich et al. 2016; over bytes: Radford et al. 2019).

    The special tokens come first: the end-of-document token with id 0, the reserved ones, then
    those that begin a document and pad a sequence if they are named. All 256 bytes are in the
    vocabulary, so any text round-trips. The same texts give the same file, byte for byte. A small
    corpus may have fewer than ``vocab_size`` entries to give. Long texts take less memory in the
    pieces of :func:`~data_pipeline.tokenizer.patterns.cut_before_white_space`.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer(word_pattern(config.digits, config.whitespace))
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=config.min_frequency,
        special_tokens=config.special_tokens,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return Tokenizer(tokenizer.to_str(pretty=True).encode("utf-8"), "the trained tokenizer", config)
