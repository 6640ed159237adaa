"""A real data folder and a real checkpoint folder of a tiny, briefly trained model, made without
starting DeepSpeed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from data_pipeline.loading.shard_loader import ShardLoader, open_shard_loader
from data_pipeline.preprocess.coordinator import build
from data_pipeline.preprocess.workspace import Output
from data_pipeline.shards.datasets import data_folders, load_datasets
from data_pipeline.shards.manifest import Manifest
from pretrain.checkpoint import layout
from pretrain.checkpoint.weights import WEIGHTS, file_of
from pretrain.config.load import load_recipe, recipe_to_yaml
from pretrain.config.loader_plan import loader_plan
from pretrain.config.recipe import Recipe
from pretrain.core.files import file_sha256
from pretrain.model.decoder import DecoderLM

STEPS = 100


@dataclass(frozen=True)
class Trained:
    """``latest`` names the only checkpoint, whose folder is ``checkpoint``."""

    data: Path
    manifest: Manifest
    checkpoint: Path
    latest: Path
    model: DecoderLM
    recipe: Recipe


def make_data(folder: Path, texts: dict[str, str], vocab_size: int = 280) -> Manifest:
    """Shards, tokenizer and manifest of a few texts."""
    sources = folder.with_name(folder.name + "-texts")
    sources.mkdir()
    for name, text in texts.items():
        (sources / name).write_text(text)
    overrides = [
        "data.source.kind=text",
        f"data.source.input=['{sources}/*.txt']",
        f"data.tokenizer.vocab_size={vocab_size}",
        "data.validation_share=0.3",
        # Not by path, which is another one in each session: the model would be another one, too.
        "data.split_by=content",
    ]
    return build(load_recipe("debug", overrides).data, Output(folder)).manifest


def make_trained(folder: Path, overrides: tuple[str, ...] = ()) -> Trained:
    """Trains on arithmetic lines with plain torch, and writes what the trainer would have written,
    but DeepSpeed's own files.
    """
    texts = {
        f"{number}.txt": "".join(f"{number} + {other} = {number + other}\n" for other in range(40))
        for number in range(30)
    }
    manifest = make_data(folder / "data", texts)
    fixed = [
        f"data.path={folder / 'data'}",
        f"model.vocab_size={manifest.tokenizer.vocab_size}",
        "train.sequence_length=32",
    ]
    recipe = load_recipe("debug", [*fixed, *overrides])
    train_sizes = recipe.train.model_copy(
        update={"micro_batch_size": recipe.train.global_batch_size}
    )
    datasets = load_datasets(data_folders(recipe.data, recipe.data_path))
    plan = loader_plan(recipe.model_copy(update={"train": train_sizes}))
    loader = open_shard_loader(recipe.data, datasets, plan, 0, 1)
    model = train(recipe, loader)
    checkpoint = layout.step_folder(folder / "checkpoints", STEPS)
    write_checkpoint(checkpoint, model, recipe, manifest, loader.state(STEPS))
    return Trained(
        folder / "data", manifest, checkpoint, checkpoint.parent / layout.LATEST, model, recipe
    )


def train(recipe: Recipe, loader: ShardLoader) -> DecoderLM:
    torch.manual_seed(recipe.seed)
    model = DecoderLM(recipe.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0) if parameter.dim() == 1 else parameter.normal_(0.0, 0.05)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(STEPS):
        (batch_BS,) = loader.step_batches(step)
        loss = model(batch_BS.input_ids_BS, batch_BS.labels_BS, batch_BS.labels_BS.numel()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def write_model(folder: Path, model: DecoderLM) -> None:
    """Writes the weights of a model as one rank with all experts does."""
    held = {*dict(model.named_parameters()), *dict(model.named_buffers())}
    tensors = {name: value for name, value in model.state_dict().items() if name in held}
    save_file(
        {name: value.detach().float().contiguous() for name, value in tensors.items()},
        folder / file_of(WEIGHTS, 0, 1),
    )


def write_checkpoint(
    checkpoint: Path,
    model: DecoderLM,
    recipe: Recipe,
    manifest: Manifest,
    data_state: dict[str, Any],
) -> None:
    """A published checkpoint: weights, recipe, tokenizer, state, manifest with checksums, and
    ``latest``.
    """
    checkpoint.mkdir(parents=True)
    write_model(checkpoint, model)
    (checkpoint / layout.RECIPE).write_text(recipe_to_yaml(recipe))
    (checkpoint / layout.TOKENIZER).write_bytes(manifest.tokenizer_path.read_bytes())
    state = {
        "step": STEPS,
        "consumed_tokens": STEPS * recipe.train.tokens_per_step,
        "tokenizer_sha256": manifest.tokenizer.sha256,
        "data": data_state,
    }
    (checkpoint / layout.STATE).write_text(json.dumps(state))
    seal(checkpoint)
    layout.write_pointer(checkpoint.parent, checkpoint.name)


def seal(checkpoint: Path) -> None:
    """Writes the manifest of what the folder holds now."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in layout.payload_files(checkpoint)
    }
    (checkpoint / layout.MANIFEST).write_text(json.dumps({"version": 1, "files": files}))
