"""Makes a checkpoint that a run continues from of a plain DeepSpeed run of a recipe's model.

Weights come in fp32 and with the optimizer's state, so that any topology continues them.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.loading.factory import open_loader
from data_pipeline.shards.datasets import Datasets
from data_pipeline.tokenizer.files import same_kind_of
from pretrain.checkpoint import layout
from pretrain.checkpoint.pickled import load_pickled
from pretrain.checkpoint.random_state import derive_random_state, random_state
from pretrain.checkpoint.rank_file import write_rank_file
from pretrain.checkpoint.state import CheckpointState
from pretrain.checkpoint.tensor_files import TensorFileWriter
from pretrain.checkpoint.tensor_headers import TensorForm
from pretrain.checkpoint.validate import open_whole_weights
from pretrain.checkpoint.weights import OPTIMIZER, RANK, WEIGHTS, file_of
from pretrain.checkpoint.weights_only import tensor_shapes
from pretrain.config.epochs import with_epoch_samples
from pretrain.config.load import recipe_to_yaml
from pretrain.config.loader_plan import loader_plan
from pretrain.config.recipe import Recipe
from pretrain.config.timeline import Timeline
from pretrain.core.errors import CheckpointError, ConfigError
from pretrain.core.files import JsonObject
from pretrain.export.convert import Conversion
from pretrain.export.deepspeed_moe import (
    checked_counts,
    expert_files,
    model_file,
    tag_folder,
    tensors_of,
)
from pretrain.export.deepspeed_state import STAND_INS, RunStates, read_states
from pretrain.export.writer import RECORD, published_folder, write_json_file


def import_deepspeed_run(
    source: Path, recipe: Recipe, datasets: Datasets, output: Path, overwrite: bool
) -> Conversion:
    """Write a checkpoint that ``branch_from`` continues, at any topology.

    The data continue after those that as many steps of the recipe read.

    Args:
        source: the folder of a tag, such as ``global_step300``, or the one above it with the file
            ``latest``; of ZeRO 0 to 2.
        recipe: of the model that was trained, with the names of this project's model and the size
            of its vocabulary.
        datasets: the recipe's.

    Raises:
        ConfigError: if the model, the optimizer or the layout cannot be continued, or ``output`` is
            taken.
        CheckpointError: for files that are missing, damaged or of another model, and for pickles
            that do more than hold data.
    """
    _check_recipe(recipe)
    folder = tag_folder(source)
    path = model_file(folder)
    main = load_pickled(path, STAND_INS)
    weights = tensors_of(path, "module", STAND_INS)
    for file in expert_files(folder, checked_counts(path, main.get("num_experts"))):
        weights |= tensors_of(file, None)
    recipe = with_epoch_samples(_with_precision(recipe, main), datasets)
    states = read_states(folder, main, weights, recipe)
    step = int(main.get("global_steps") or 0)
    with published_folder(output, overwrite) as temporary:
        tensors, size = _write_weights(temporary, recipe, states)
        open_whole_weights(temporary, recipe.model)
        size += _write_optimizer(temporary, recipe, states)
        # It is not known what the ranks would have drawn.
        derive_random_state(recipe.seed, step, 0)
        write_rank_file(temporary / file_of(RANK, 0, 1), {"random": random_state(), "own": {}})
        texts = {
            layout.RECIPE: recipe_to_yaml(recipe),
            layout.DS_CONFIG: json.dumps({"zero_optimization": {"stage": states.zero_stage}}),
            layout.STATE: json.dumps(_state(recipe, datasets, main, states), indent=2),
        }
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
        tokenizer = datasets.tokenizer_path
        shutil.copyfile(tokenizer, temporary / same_kind_of(tokenizer))
        conversion = Conversion(
            "checkpoint", step, "float32", tensors, size, None, _place_of_data(recipe, main)
        )
        write_json_file(temporary / RECORD, conversion.to_dict())
        files = {
            file.relative_to(temporary).as_posix(): layout.file_entry(file)
            for file in layout.payload_files(temporary)
        }
        layout.write_manifest(temporary, files)
    return conversion


def _check_recipe(recipe: Recipe) -> None:
    moe = recipe.model.moe
    if moe is not None and moe.has_tables and recipe.model.routed_layers:
        raise ConfigError(
            f"model.moe.kind={moe.kind} is no layer of DeepSpeed's: give the recipe of the model "
            "that was trained"
        )
    if not recipe.optimizer.has_universal_checkpoints:
        raise ConfigError(
            f"optimizer.kind={recipe.optimizer.kind} cannot continue states of DeepSpeed's: only "
            "Adam's are read, so set optimizer.kind=adamw"
        )
    if recipe.data.streaming:
        raise ConfigError(
            "with data.streaming no step says which data it reads: set data.streaming=false"
        )


def _with_precision(recipe: Recipe, main: JsonObject) -> Recipe:
    """The recipe with the precision of the run."""
    config = main.get("ds_config")
    sections = config if isinstance(config, dict) else {}
    found = next(
        (
            name
            for name in ("bf16", "fp16")
            if isinstance(sections.get(name), dict) and sections[name].get("enabled")
        ),
        "fp32",
    )
    train = recipe.train.model_copy(update={"precision": found})
    return recipe.model_copy(update={"train": train})


def _write_weights(folder: Path, recipe: Recipe, states: RunStates) -> tuple[int, int]:
    """Write all weights and buffers; return how many and their bytes."""
    dense, experts = tensor_shapes(recipe.model)
    shapes = dense | experts
    forms = {name: TensorForm(torch.float32, shape) for name, shape in shapes.items()}
    with TensorFileWriter(folder / file_of(WEIGHTS, 0, 1), forms) as file:
        for name in file.order:
            file.write(name, states.read(name, "fp32", shapes[name]).float())
    return len(forms), sum(form.bytes for form in forms.values())


def _write_optimizer(folder: Path, recipe: Recipe, states: RunStates) -> int:
    """Write the optimizer's states; return their bytes."""
    dense, experts = tensor_shapes(recipe.model)
    shapes = dense | experts
    forms: dict[str, TensorForm] = {}
    for name in shapes:
        for key, parts in states.parts[name].items():
            if key != "fp32":
                forms[f"{name}/{key}"] = TensorForm(parts[0].dtype, shapes[name])
        for key, number in states.numbers.get(name, {}).items():
            forms[f"{name}/{key}"] = TensorForm(number.dtype, ())
    if odd := sorted(
        {name.rpartition("/")[2] for name in forms} - {"step", "exp_avg", "exp_avg_sq"}
    ):
        raise ConfigError(
            f"the optimizer has the state '{odd[0]}', which is not Adam's: its run cannot continue"
        )
    if any(form.dtype == torch.uint8 for form in forms.values()):
        raise CheckpointError("the optimizer's moments have 8 bits: only those of fp32 are read")
    with TensorFileWriter(folder / file_of(OPTIMIZER, 0, 1), forms) as file:
        for name, tensor in _optimizer_tensors(states, file.order, shapes):
            file.write(name, tensor)
    return sum(form.bytes for form in forms.values())


def _optimizer_tensors(
    states: RunStates, order: list[str], shapes: dict[str, tuple[int, ...]]
) -> Iterator[tuple[str, Tensor]]:
    for full in order:
        name, _, key = full.rpartition("/")
        number = states.numbers.get(name, {}).get(key)
        yield full, states.read(name, key, shapes[name]) if number is None else number


def _state(
    recipe: Recipe, datasets: Datasets, main: JsonObject, states: RunStates
) -> CheckpointState:
    step = int(main.get("global_steps") or 0)
    skipped = int(main.get("skipped_steps") or 0)
    timeline = Timeline(recipe)
    loader = open_loader(recipe.data, datasets, loader_plan(recipe, timeline), 0, 1)
    return {
        "tokenizer_sha256": datasets.tokenizer.sha256,
        "world_size": states.world_size,
        "ep_size": states.ep_size,
        "zero_stage": states.zero_stage,
        "step": step,
        "consumed_tokens": timeline.tokens_after(step),
        "epoch": loader.epochs(step),
        "validation_loss": None,
        "validation_step": None,
        "validation_targets": None,
        "phase": timeline.at(max(step - 1, 0)).name or None,
        "progress": {"step": step, "skipped_steps": skipped},
        "data": loader.state(step),
        "guards": {},
        "engine": {
            "steps": step,
            "samples": int(main.get("global_samples") or 0),
            "skipped": skipped,
            "loss_scale": states.loss_scale,
        },
        "saved_at": time.time(),
    }


def _place_of_data(recipe: Recipe, main: JsonObject) -> str:
    """Say where the data continue, in a sentence."""
    step = int(main.get("global_steps") or 0)
    said = (
        f"a run that branches from it continues the recipe's data after {step} steps of "
        f"{recipe.train.global_batch_size} sequences"
    )
    samples = int(main.get("global_samples") or 0)
    expected = step * recipe.train.global_batch_size
    if recipe.phases or samples == expected:
        return said
    return f"{said}, and DeepSpeed counted {samples} sequences instead of {expected}"
