"""Checkpoints of random weights, none of them at a value that would hide a mistake."""

from __future__ import annotations

from pathlib import Path

import torch

from data_pipeline.tokenizer.config import TrainBPE
from data_pipeline.tokenizer.tokenizer import Tokenizer
from data_pipeline.tokenizer.training import train_bpe
from pretrain.checkpoint.weights_only import write_weights_folder
from pretrain.config.load import load_recipe
from pretrain.config.recipe import Recipe
from pretrain.model.decoder import DecoderLM

TEXT = "def f(x):\n  '  return Xyz ünï don't 12345\t\n\n\n end"
VOCAB_SIZE = 300


def small_tokenizer() -> Tokenizer:
    return train_bpe([TEXT] * 9, TrainBPE(vocab_size=VOCAB_SIZE))


def recipe_of(name: str, *overrides: str) -> Recipe:
    return load_recipe(name, [f"model.vocab_size={VOCAB_SIZE}", "parallel.ep_size=1", *overrides])


def random_model(recipe: Recipe, seed: int = 0) -> DecoderLM:
    """Norms away from one, biases away from zero, and matrices large enough for logits to differ
    and for routing to be clear.
    """
    torch.manual_seed(seed)
    model = DecoderLM(recipe.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = "norm" in name and parameter.dim() == 1 and name.endswith("weight")
            parameter.normal_(1.0 if norm else 0.0, 0.2 if parameter.shape[-1] < 200 else 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("balance_bias"):
                buffer.normal_(0.0, 0.1)
    return model.eval()


def random_checkpoint(
    folder: Path, recipe: Recipe, tokenizer: Tokenizer, seed: int = 0
) -> DecoderLM:
    """Writes a folder of weights alone, and returns the model that it holds."""
    model = random_model(recipe, seed)
    tied = {"head.weight"} if recipe.model.tie_word_embeddings else set()
    folder.parent.mkdir(parents=True, exist_ok=True)
    tokenizer_file = folder.with_name(folder.name + "-tokenizer.json")
    tokenizer_file.write_bytes(tokenizer.content)
    write_weights_folder(
        folder,
        recipe,
        ((name, tensor) for name, tensor in model.state_dict().items() if name not in tied),
        tokenizer_file,
    )
    return model
