"""A model with its tokenizer, either from a checkpoint or from a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from data_pipeline.tokenizer.files import tokenizer_file
from data_pipeline.tokenizer.tokenizer import Tokenizer, load_tokenizer
from pretrain.checkpoint.tokenizer_files import end_ids, read_side_files, token_ids
from pretrain.checkpoint.weights import load_model
from pretrain.core.errors import ConfigError
from pretrain.evaluation.call_dependence import call_dependence, call_dependence_of_export
from pretrain.evaluation.checkpoint import whole_checkpoint
from pretrain.evaluation.generation.generate import (
    ONE_TEXT,
    NextLogits,
    native_next_logits,
    transformers_next_logits,
)
from pretrain.evaluation.generation.speculative import DraftingModel, NativeDrafting
from pretrain.export.hf_files import is_hf_folder
from pretrain.export.hf_open import check_fit, open_model, open_tokenizer
from pretrain.model.decoder import DecoderLM

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


class TextGenerator(Protocol):
    """What a command needs to write text. A new document starts with ``eod_id``.

    Attributes:
        end_ids: tokens that end a text; ``eod_id`` is among them if there is one.
        call_dependence: why logits depend on what is computed together, in a sentence; None if they
            do not.
    """

    end_ids: frozenset[int]
    max_positions: int
    call_dependence: str | None

    @property
    def eod_id(self) -> int:
        """The token that ends a document; :class:`ConfigError` if the tokenizer has none."""

    def encode(self, text: str) -> list[int]:
        """Token ids without special tokens."""

    def decode(self, ids: list[int]) -> str:
        """The text of token ids."""

    def start(self, max_tokens: int, padding: Sequence[int] = ONE_TEXT) -> NextLogits:
        """New texts of at most ``max_tokens`` tokens, prompts included.

        ``padding`` of each text's first call.
        """

    def start_drafting(self, max_tokens: int) -> DraftingModel:
        """As :meth:`start`, for speculative decoding; :class:`ConfigError` if nothing can draft."""


class NativeGenerator:
    """One of our models; ``ends`` are tokens that end a text, other than the end of a document."""

    def __init__(
        self,
        model: DecoderLM,
        tokenizer: Tokenizer,
        device: torch.device,
        ends: frozenset[int] = frozenset(),
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.device = device
        self.max_positions = model.config.max_position_embeddings
        self.call_dependence = call_dependence(model.config)
        self.end_ids = ends | ({tokenizer.eod_id} if tokenizer.eod_id is not None else set())

    @property
    def eod_id(self) -> int:
        """See :attr:`TextGenerator.eod_id`."""
        if self.tokenizer.eod_id is None:
            raise ConfigError(
                f"{self.tokenizer.origin} has no token that ends a document, with which a new text"
                " begins: begin with a prompt, or name it with data.tokenizer.eod_token"
            )
        return self.tokenizer.eod_id

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without special tokens."""
        return self.tokenizer.encode([text])[0].tolist()

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids."""
        return self.tokenizer.decode(ids)

    def start(self, max_tokens: int, padding: Sequence[int] = ONE_TEXT) -> NextLogits:
        """Begin new texts; see :meth:`TextGenerator.start`."""
        return native_next_logits(self.model, max_tokens, self.device, padding)

    def start_drafting(self, max_tokens: int) -> DraftingModel:
        """Begin a text whose tokens the multi-token block drafts."""
        if self.model.multi_token is None:
            raise ConfigError(
                "the model was trained without model.multi_token_prediction, so nothing drafts:"
                " leave --draft out"
            )
        return NativeDrafting(self.model, max_tokens, self.device)


class TransformersGenerator:
    """A model that transformers opened.

    ``bos_ids`` is the token that its tokenizer puts before a text, if it does.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, device: torch.device
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.device = device
        self.vocab_size = int(model.config.vocab_size)
        nn.Module.to(model, device)  # transformers' own .to() is decorated, and loses its signature
        self.eod_id = document_end(model.config, tokenizer)
        self.max_positions = int(model.config.max_position_embeddings)
        begins = list(tokenizer("a")["input_ids"])[:1]
        self.bos_ids = begins if begins == [tokenizer.bos_token_id] else []
        self.call_dependence = call_dependence_of_export(model.config)
        generation = model.generation_config
        self.end_ids = token_ids(generation.eos_token_id if generation is not None else None) | {
            self.eod_id,
            int(tokenizer.eos_token_id),
        }

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without special tokens."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids."""
        return str(self.tokenizer.decode(ids))

    def start(self, max_tokens: int, padding: Sequence[int] = ONE_TEXT) -> NextLogits:
        """Begin new texts; see :meth:`TextGenerator.start`."""
        return transformers_next_logits(self.model, max_tokens, self.device, padding)

    def start_drafting(self, max_tokens: int) -> DraftingModel:
        """Raise :class:`ConfigError`: transformers has no block that drafts."""
        raise ConfigError(
            "a Hugging Face folder has no block of multi-token prediction: leave --draft out, or"
            " give one of our checkpoints"
        )


def document_end(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """The end-of-document token: the first that ``config.json`` names.

    A chat model's tokenizer names the end of a message instead.
    """
    named = (
        config.eos_token_id[:1] if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    )
    # A class has an id by default too, which may be any word of this vocabulary.
    return next(
        (token for token in named if token in tokenizer.added_tokens_decoder),
        int(tokenizer.eos_token_id),
    )


def open_generator(path: Path, device: torch.device) -> NativeGenerator | TransformersGenerator:
    """Opens a Hugging Face folder if there is a ``config.json``, else a checkpoint of this project.

    Raises:
        CheckpointError: if it is neither, or incomplete, or its tokenizer has no end-of-document
            token.
    """
    if is_hf_folder(path):
        return open_transformers(path, device)
    checkpoint = whole_checkpoint(path)
    model, recipe = load_model(checkpoint, device=device)
    tokenizer = load_tokenizer(tokenizer_file(checkpoint), recipe.data.tokenizer)
    return NativeGenerator(model, tokenizer, device, end_ids(read_side_files(checkpoint)))


def open_transformers(path: Path, device: torch.device) -> TransformersGenerator:
    """Opens a Hugging Face model folder, without the network. No code in it is run.

    Raises:
        CheckpointError: if the folder is incomplete or damaged, holds foreign code, or its
            tokenizer has no end-of-document token.
    """
    tokenizer = open_tokenizer(path)
    model = open_model(path)
    check_fit(path, model, tokenizer)
    return TransformersGenerator(model, tokenizer, device)
