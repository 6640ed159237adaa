"""Tokenizers: loaded from several formats or trained, always held as a ``tokenizer.json``; and fast engines that give the same ids."""

from data_pipeline.tokenizer.configured import load_configured
from data_pipeline.tokenizer.patterns import cut_before_white_space
from data_pipeline.tokenizer.tokenizer import Tokenizer, load_tokenizer
from data_pipeline.tokenizer.training import train_bpe

__all__ = ["Tokenizer", "cut_before_white_space", "load_configured", "load_tokenizer", "train_bpe"]
