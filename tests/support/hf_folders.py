"""Hugging Face folders as strangers and accidents make them: copies of a whole one with code in
them, or with something missing.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pretrain.export.writer import INDEX, WEIGHTS

Change = Callable[[Path], None]


def copy_of(source: Path, folder: Path, change: Change | None = None) -> Path:
    shutil.copytree(source, folder)
    if change is not None:
        change(folder)
    return folder


def edit_json(folder: Path, name: str = "config.json", **fields: Any) -> None:
    path = folder / name
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(
        json.dumps(
            {field: value for field, value in (content | fields).items() if value is not None}
        )
    )


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    tensors = change(load_file(folder / WEIGHTS))
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / WEIGHTS,
        metadata={"format": "pt"},
    )


def without(*names: str) -> Change:
    return lambda folder: edit_weights(
        folder, lambda tensors: {name: tensors[name] for name in tensors if name not in names}
    )


def with_tensor(name: str, tensor: Tensor) -> Change:
    return lambda folder: edit_weights(folder, lambda tensors: tensors | {name: tensor})


def changed_tensor(name: str, change: Callable[[Tensor], Tensor]) -> Change:
    return lambda folder: edit_weights(
        folder, lambda tensors: tensors | {name: change(tensors[name])}
    )


def without_expert(number: int) -> Change:
    """Neither of its matrices in any layer."""
    return lambda folder: edit_weights(
        folder,
        lambda tensors: {
            name: tensors[name] for name in tensors if f".experts.{number}." not in name
        },
    )


def truncated(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def sharded(folder: Path) -> dict[str, str]:
    """Two shards and their index, which is returned."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    halves = {
        "model-00001-of-00002.safetensors": names[::2],
        "model-00002-of-00002.safetensors": names[1::2],
    }
    for file, half in halves.items():
        save_file({name: tensors[name] for name in half}, folder / file, metadata={"format": "pt"})
    places = {name: file for file, half in halves.items() for name in half}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return places


def missing_shard(folder: Path) -> None:
    sharded(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def wrong_index(folder: Path) -> None:
    places = sharded(folder)
    files = sorted(set(places.values()))
    first = min(places)
    (folder / INDEX).write_text(
        json.dumps({"weight_map": places | {first: files[places[first] == files[0]]}})
    )


def escaping_index(folder: Path) -> None:
    places = sharded(folder)
    (folder / INDEX).write_text(
        json.dumps({"weight_map": {name: f"../{file}" for name, file in places.items()}})
    )


def both_weights(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    sharded(folder)
    (folder / WEIGHTS).write_bytes(whole)


class Evil:
    """Unpickling it writes the canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.canary, "unpickled")


def pickled(folder: Path, canary: Path, name: str = "pytorch_model.bin") -> None:
    with (folder / name).open("wb") as file:
        pickle.dump({"weight": Evil(canary)}, file)


def evil_code(canary: Path) -> str:
    """Python that writes the canary as soon as it is imported, and has a class of any name."""
    return (
        f"open({str(canary)!r}, 'w').write('imported')\n"
        "from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast\n"
        "class Config(PretrainedConfig):\n    model_type = 'evil'\n"
        "class Model(PreTrainedModel):\n    config_class = Config\n"
        "class Tokenizer(PreTrainedTokenizerFast):\n    pass\n"
        "def generate(*arguments, **named):\n    pass\n"
    )


def fused_experts(folder: Path) -> None:
    """As transformers 5 writes them if it is asked for its own names: the experts of a layer in two
    tensors.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    (folder / WEIGHTS).unlink()
    model.save_pretrained(folder, save_original_format=False)
