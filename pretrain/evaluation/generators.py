"""A model and its tokenizer behind one small interface, whether it is one of our checkpoints or a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from data_pipeline.tokenizer import Tokenizer, load_tokenizer
from pretrain.checkpoint.layout import TOKENIZER
from pretrain.checkpoint.weights import load_model
from pretrain.config.errors import ConfigError
from pretrain.evaluation.checkpoint import whole_checkpoint
from pretrain.evaluation.generation import ONE_TEXT, NextLogits, native_next_logits, transformers_next_logits
from pretrain.evaluation.speculative import DraftingModel, NativeDrafting
from pretrain.export.hf_files import is_hf_folder
from pretrain.export.hf_open import check_fit, open_model, open_tokenizer
from pretrain.model.decoder import DecoderLM

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class TextGenerator(Protocol):
    """What a command needs to write text."""

    eod_id: int
    max_positions: int

    def encode(self, text: str) -> list[int]:
        """Token ids without special tokens."""

    def decode(self, ids: list[int]) -> str:
        """The text of token ids."""

    def start(self, max_tokens: int, padding: Sequence[int] = ONE_TEXT) -> NextLogits:
        """New texts of at most ``max_tokens`` tokens, prompts included; ``padding`` of each text's first call."""

    def start_drafting(self, max_tokens: int) -> DraftingModel:
        """As :meth:`start`, for speculative decoding; raises :class:`ConfigError` where the model has nothing that drafts."""


class NativeGenerator:
    """One of our models."""

    def __init__(self, model: DecoderLM, tokenizer: Tokenizer, device: torch.device) -> None:
        self.model, self.tokenizer, self.device = model, tokenizer, device
        self.eod_id, self.max_positions = tokenizer.eod_id, model.config.max_position_embeddings

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode([text])[0].tolist()

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)

    def start(self, max_tokens: int, padding: Sequence[int] = ONE_TEXT) -> NextLogits:
        return native_next_logits(self.model, max_tokens, self.device, padding)

    def start_drafting(self, max_tokens: int) -> DraftingModel:
        if self.model.multi_token is None:
            raise ConfigError("the model was trained without model.multi_token_prediction, so nothing drafts: leave --draft out")
        return NativeDrafting(self.model, max_tokens, self.device)


class TransformersGenerator:
    """A model that transformers opened."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> None:
        self.model, self.tokenizer, self.device = model.eval(), tokenizer, device
        self.vocab_size = int(model.config.vocab_size)
        nn.Module.to(model, device)  # transformers' own .to() is decorated, and loses its signature
        self.eod_id, self.max_positions = int(tokenizer.eos_token_id), int(model.config.max_position_embeddings)

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids))

    def start(self, max_tokens: int, padding: Sequence[int] = ONE_TEXT) -> NextLogits:
        return transformers_next_logits(self.model, max_tokens, self.device, padding)

    def start_drafting(self, max_tokens: int) -> DraftingModel:
        raise ConfigError("a Hugging Face folder has no block of multi-token prediction: leave --draft out, or give one of our checkpoints")


def open_generator(path: Path, device: torch.device) -> NativeGenerator | TransformersGenerator:
    """Opens a Hugging Face folder where there is a ``config.json``, else one of our checkpoints.

    Raises:
        CheckpointError: where it is neither, or incomplete, or its tokenizer has no end-of-document token.
    """
    if is_hf_folder(path):
        return open_transformers(path, device)
    checkpoint = whole_checkpoint(path)
    model, recipe = load_model(checkpoint, device=device)
    return NativeGenerator(model, load_tokenizer(checkpoint / TOKENIZER, recipe.data.tokenizer), device)


def open_transformers(path: Path, device: torch.device) -> TransformersGenerator:
    """Opens a Hugging Face model folder, without the network. No code in it is run.

    Raises:
        CheckpointError: when the folder is incomplete or damaged, holds foreign code, or its tokenizer has no end-of-document token.
    """
    tokenizer, model = open_tokenizer(path), open_model(path)
    check_fit(path, model, tokenizer)
    return TransformersGenerator(model, tokenizer, device)
