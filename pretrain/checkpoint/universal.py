"""Writes a checkpoint in DeepSpeed's universal format, which DeepSpeed loads on any topology.

```
universal/
  mp_rank_00_model_states.pt             counts and buffers; ZeRO 3 reads the same content
  zero_pp_rank_0_mp_rank_00_model_states.pt      under this name
  zero/optimizer_state.pt                what belongs to no single parameter
  zero/<parameter>/fp32.pt               the weight, stacked experts whole
  zero/<parameter>/exp_avg.pt  exp_avg_sq.pt  step.pt
latest_universal                         text: universal
```

The format has one tensor for each parameter, as our files have, so nothing but names and wrappings
changes (``deepspeed/checkpoint/universal_checkpoint.py`` reads it).
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from pretrain.checkpoint.layout import read_recipe, read_state
from pretrain.checkpoint.optimizer_state import StoredStates
from pretrain.checkpoint.pickled import load_pickled
from pretrain.checkpoint.state import CheckpointState
from pretrain.checkpoint.tensor_files import TensorReader
from pretrain.checkpoint.validate import open_whole_weights
from pretrain.checkpoint.weights import OPTIMIZER, files_of
from pretrain.checkpoint.weights_only import tensor_shapes
from pretrain.config.recipe import Recipe
from pretrain.core.errors import CheckpointError, ConfigError
from pretrain.core.files import JsonObject
from pretrain.model.decoder import DecoderLM

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

UNIVERSAL_TAG = "universal"
UNIVERSAL_LATEST = "latest_universal"
# The first for ZeRO 1 and 2, the second for ZeRO 3.
MODEL_FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
# The key of a tensor in its file, and what else it says of stacked experts.
PARAM, IS_EXPERT, EXPERTS = "param", "is_expert_param", "ep_num_experts"
MOMENTS = ("exp_avg", "exp_avg_sq")
UNIVERSAL_INFO = "universal_checkpoint_info"
FORMAT_VERSION = 0.4


def check_universal(checkpoint: Path) -> None:
    """Check that DeepSpeed can load a checkpoint in its universal format.

    Raises:
        ConfigError: if it cannot, or there is no optimizer state to write.
    """
    if "engine" not in read_state(checkpoint):
        raise ConfigError(
            f"{checkpoint} holds weights alone, without an optimizer's state: convert a checkpoint "
            "of a run"
        )
    recipe = read_recipe(checkpoint)
    moe = recipe.model.moe
    if moe is not None and recipe.model.routed_layers and not moe.has_universal_checkpoints:
        raise ConfigError(
            f"model.moe.kind={moe.kind} has no universal checkpoints, because DeepSpeed finds no "
            "expert of it by a number that holds on all ranks: convert with --to safetensors, or "
            "resume the run at any topology here"
        )
    if not recipe.optimizer.has_universal_checkpoints:
        raise ConfigError(
            f"optimizer.kind={recipe.optimizer.kind} has no universal checkpoints, because "
            "DeepSpeed loads Adam's two moments in fp32 only: convert with --to safetensors, or "
            "resume the run at any topology here"
        )


def write_universal(checkpoint: Path, folder: Path) -> tuple[int, int]:
    """Write ``universal/`` and ``latest_universal`` into a folder, a tensor at a time.

    Every weight and moment is read back and compared bit for bit.

    Returns:
        The number of weights, and the bytes of all files.

    Raises:
        ConfigError: see :func:`check_universal`.
        CheckpointError: if a weight or a state is missing or damaged, or parameters have taken
            different numbers of steps.
        OSError: if the disk is full.
    """
    check_universal(checkpoint)
    recipe, state = read_recipe(checkpoint), read_state(checkpoint)
    weights = open_whole_weights(checkpoint, recipe.model)
    experts = tensor_shapes(recipe.model)[1]
    with torch.device("meta"):
        parameters = [name for name, _ in DecoderLM(recipe.model).named_parameters()]
    states = StoredStates(TensorReader(files_of(checkpoint, OPTIMIZER)))
    step = _step(states, parameters, checkpoint)
    target = folder / UNIVERSAL_TAG
    for name in tqdm(parameters, desc="writing parameters", unit="tensor"):
        place = target / "zero" / name
        place.mkdir(parents=True)
        about = {IS_EXPERT: True, EXPERTS: experts[name][0]} if name in experts else {}
        weight = weights.read(name)
        _write_tensor(place / "fp32.pt", weight, about)
        for key in MOMENTS:
            # A parameter that was never trained has none: Adam's begin at 0.
            has_moment = key in states.keys.get(name, ())
            moment = states.reader.read(f"{name}/{key}") if has_moment else weight.new_zeros(())
            _write_tensor(place / f"{key}.pt", moment.float().expand(weight.shape), about)
        torch.save(step, place / "step.pt")
    # Without options in the groups, those of the engine that loads hold. No engine has more groups
    # than parameters, and DeepSpeed loads only as many as there are here.
    groups: list[JsonObject] = [{"params": []} for _ in parameters]
    of_stage_3 = {"state": {0: {"step": step}}, "param_groups": groups}
    common = {"ds_version": version("deepspeed"), "param_groups": groups}
    torch.save(common | {"optimizer_state_dict": of_stage_3}, target / "zero/optimizer_state.pt")
    content = _model_state(recipe, state, weights, parameters)
    for file in MODEL_FILES:
        torch.save(content, target / file)
    (folder / UNIVERSAL_LATEST).write_text(UNIVERSAL_TAG, encoding="utf-8")
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    return len(parameters), size


def _step(states: StoredStates, parameters: list[str], checkpoint: Path) -> Tensor | int:
    """Return the number of Adam's steps, as the optimizer keeps it."""
    steps = {
        name: states.reader.read(f"{name}/step")
        for name in parameters
        if "step" in states.keys.get(name, ())
    }
    if not steps:
        return torch.tensor(0.0)
    least, most = min(steps, key=lambda name: steps[name]), max(steps, key=lambda name: steps[name])
    if steps[least] != steps[most]:
        raise ConfigError(
            f"{checkpoint} has no universal form: '{least}' has taken {int(steps[least])} steps and "
            f"'{most}' {int(steps[most])}, and DeepSpeed loads one number for all: convert with "
            "--to safetensors, or resume the run at any topology here"
        )
    step = steps[most]
    # An int64 stands for a Python number.
    return int(step) if step.dtype == torch.int64 else step


def _write_tensor(path: Path, tensor: Tensor, about: dict[str, Any]) -> None:
    tensor = tensor.contiguous()
    torch.save({PARAM: tensor, **about}, path)
    if not torch.equal(load_pickled(path)[PARAM], tensor):
        raise CheckpointError(
            f"'{path.parent.name}' did not read back as it was written: nothing was published, "
            "check the disk"
        )


def _model_state(
    recipe: Recipe, state: CheckpointState, weights: TensorReader, parameters: list[str]
) -> JsonObject:
    """Return what DeepSpeed reads of a model in addition to its parameters."""
    counts = state["engine"]
    model = recipe.model
    experts = 0 if model.moe is None else model.total_experts
    return {
        "module": {name: weights.read(name) for name in weights.names if name not in parameters},
        "param_shapes": [{name: torch.Size(weights.form(name).shape) for name in parameters}],
        "num_experts": [experts] * len(model.routed_layers),
        UNIVERSAL_INFO: {
            "universal_checkpoint_version": FORMAT_VERSION,
            "expert_parameter_patterns": [r".*\.experts\.w[123]$"],
        },
        "global_steps": counts["steps"],
        "global_samples": counts["samples"],
        "skipped_steps": counts["skipped"],
        "loss_scale": counts["loss_scale"],
        "lr_scheduler": None,
        "optimizer": None,
        "dp_world_size": state.get("world_size", 1),
        # There are no tensor-parallel ranks.
        "mp_world_size": 1,
        "ds_version": version("deepspeed"),
    }


def load_universal(engine: DeepSpeedEngine, folder: Path) -> None:
    """Load what :func:`write_universal` made into an engine of any world size and ``ep_size``.

    DeepSpeed alone leaves out buffers, such as balancing biases, and the scale of fp16, and at
    ZeRO 3 makes one tensor the step of all parameters, which each of them then counts up.

    Args:
        engine: of ZeRO 1 to 3; its ds_config has ``"checkpoint": {"load_universal": true}``. Every
            rank must call it.

    Raises:
        CheckpointError: if ``folder`` is not a universal checkpoint.
    """
    if not (folder / UNIVERSAL_TAG / "zero").is_dir():
        raise CheckpointError(
            f"{folder} is no universal checkpoint: give a folder that "
            "tools/convert_checkpoint.py --to universal has written"
        )
    engine.load_checkpoint(str(folder), tag=UNIVERSAL_TAG, load_lr_scheduler_states=False)
    for state in engine.optimizer.optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].clone()
    content = load_pickled(folder / UNIVERSAL_TAG / MODEL_FILES[0])
    buffers = dict(engine.module.named_buffers())
    with torch.no_grad():
        for name, values in content["module"].items():
            buffers[name].copy_(values)
    for name, count in content["loss_scale"].items():
        if hasattr(engine.optimizer.loss_scaler, name):
            setattr(engine.optimizer.loss_scaler, name, count)
