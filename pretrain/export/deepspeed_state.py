"""The fp32 weights and optimizer states of a plain DeepSpeed run, by the names of the whole model.

DeepSpeed saves what each rank holds (DeepSpeed 0.19, ``runtime/engine.py``):

- ZeRO 1 and 2: ``zero_pp_rank_R_mp_rank_00_optim_states.pt`` has a flat fp32 partition of each
  parameter group and of its states, and says where each parameter's part is in it. The parts of a
  parameter are in the order of the ranks that hold it.
- ZeRO 0: whole states, numbered in the order of the optimizer's groups, in
  ``expp_rank_E_mp_rank_00_optim_states.pt`` for each rank E among experts, and for a dense model in
  the model file.

A rank numbers its experts from 0, so that equal names on two ranks may be of two experts.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.checkpoint.pickled import load_pickled
from pretrain.checkpoint.weights_only import tensor_shapes
from pretrain.config.recipe import Recipe
from pretrain.core.errors import CheckpointError, ConfigError
from pretrain.core.files import JsonObject
from pretrain.model.config import ModelConfig
from pretrain.model.decoder import DecoderLM
from pretrain.optim.param_groups import parameter_role

ZERO_FILE = re.compile(r"^(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt$")
EXPERT_FILE = re.compile(r"^expp_rank_(\d+)_mp_rank_00_optim_states\.pt$")
DAMAGED = "the checkpoint is damaged, take another one"


class FragmentAddress:
    """Where a parameter's part is in a flat partition."""

    numel: int
    start: int


class LossScale:
    """The counts of fp16's loss scale."""


STAND_INS: Mapping[str, type] = {
    "deepspeed.utils.tensor_fragment.fragment_address": FragmentAddress,
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": LossScale,
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": LossScale,
    "deepspeed.runtime.zero.config.ZeroStageEnum": int,
}


@dataclass
class RunStates:
    """What all ranks have saved of the optimizer.

    Attributes:
        parts: the flat parts of each fp32 weight (``fp32``) and elementwise state, by parameter and
            state, in the order of their elements; they are in their files until they are read.
        numbers: states of one number, such as Adam's step.
        loss_scale: the counts of fp16's; empty in other precisions.
    """

    zero_stage: int
    world_size: int
    ep_size: int
    parts: dict[str, dict[str, list[Tensor]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )
    numbers: dict[str, dict[str, Tensor]] = field(default_factory=lambda: defaultdict(dict))
    loss_scale: dict[str, float] = field(default_factory=dict)

    def read(self, name: str, key: str, shape: tuple[int, ...]) -> Tensor:
        """A whole weight or state.

        Raises:
            CheckpointError: if parts are missing or superfluous.
        """
        parts = [part.reshape(-1) for part in self.parts[name][key]]
        found = sum(part.numel() for part in parts)
        if found != prod(shape):
            raise CheckpointError(
                f"'{key}' of '{name}' has {found} of {prod(shape)} elements in the ranks' files: "
                "files are missing, or the recipe's model is another one"
            )
        return torch.cat(parts).view(shape)


class Names:
    """The parameters of one rank, and what they are in the whole model.

    Attributes:
        dense, experts: the shapes in the whole model.
    """

    def __init__(self, model: ModelConfig, ep_size: int) -> None:
        self.model = model
        self.dense, self.experts = tensor_shapes(model)
        self.local_experts = model.total_experts // ep_size if self.experts else 0
        self.ep_size = ep_size

    def whole(self, local: str, ep_rank: int) -> str:
        """The name in the whole model of a parameter of a rank among the experts' ranks.

        Raises:
            CheckpointError: if the model has none.
        """
        name = local
        if self.model.moe is not None:
            first = ep_rank * self.local_experts
            name = self.model.moe.renumbered(local, lambda number: number + first)
        if name not in self.dense and name not in self.experts:
            raise CheckpointError(
                f"the recipe's model has no parameter '{name}': give the recipe of the model that "
                "was trained, with the names of this project"
            )
        return name

    def of_a_rank(self) -> dict[str, Tensor]:
        """The parameters of a rank in the model's order, without memory."""
        with torch.device("meta"):
            built = dict(DecoderLM(self.model).named_parameters())
        found: dict[str, Tensor] = {}
        for name, parameter in built.items():
            if name not in self.experts:
                found[name] = parameter
                continue
            numbers = self._numbers(name)
            if not numbers:
                found[name] = parameter[: self.local_experts]
            elif numbers[0] < self.local_experts:
                found[name] = parameter
        return found

    def _numbers(self, name: str) -> list[int]:
        """The number of the expert that has a tensor for itself; empty for stacked experts."""
        numbers: list[int] = []

        def note(number: int) -> int:
            numbers.append(number)
            return number

        assert self.model.moe is not None
        self.model.moe.renumbered(name, note)
        return numbers


def read_states(
    folder: Path, main: JsonObject, weights: Mapping[str, Tensor], recipe: Recipe
) -> RunStates:
    """Read what the ranks have saved.

    Args:
        folder: of the tag.
        main: the content of the model file.
        weights: of the model file and the experts' files; those of a stacked expert are called
            ``<name>.<expert>``.

    Raises:
        ConfigError: for states that cannot be assigned to parameters.
        CheckpointError: for files that are missing, damaged or of another model.
    """
    by_rank = _numbered(folder, ZERO_FILE)
    world_size = int(main.get("dp_world_size") or 1)
    if by_rank:
        _check_all(folder, by_rank, world_size, "zero_pp_rank_*_optim_states.pt")
        states = _of_partitions(by_rank, main, recipe)
        # Weights are never taken from the model file here: there they may be rounded.
        parameters = Names(recipe.model, 1).of_a_rank()
        for name in tensor_shapes(recipe.model)[0].keys() - parameters.keys():
            states.parts[name]["fp32"] = [weights[name]] if name in weights else []
        return states
    by_part = _numbered(folder, EXPERT_FILE)
    if by_part:
        _check_all(folder, by_part, len(by_part), "expp_rank_*_optim_states.pt")
    of_experts = [load_pickled(path, STAND_INS).get("optimizer") for path in by_part]
    found = of_experts or [main.get("optimizer")]
    contents = [content for content in found if isinstance(content, dict)]
    if len(contents) != len(found):
        raise ConfigError(
            f"{folder} holds no optimizer states to continue with: without --recipe its weights "
            "alone are converted"
        )
    return _of_whole_states(contents, weights, world_size, recipe)


def _numbered(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    """The files that a pattern finds, by their number."""
    found = {
        int(match[1]): path for path in folder.iterdir() if (match := pattern.match(path.name))
    }
    return [found[number] for number in sorted(found)]


def _check_all(folder: Path, paths: list[Path], count: int, what: str) -> None:
    numbers = {int(re.findall(r"rank_(\d+)_", path.name)[0]) for path in paths}
    if numbers != set(range(count)):
        raise CheckpointError(
            f"{folder} has {what} of the ranks {sorted(numbers)} and should have {count}: {DAMAGED}"
        )


def _of_partitions(paths: list[Path], main: JsonObject, recipe: Recipe) -> RunStates:
    """ZeRO 1 and 2."""
    whole = Names(recipe.model, 1)
    local = {name: shape for group in main["param_shapes"] for name, shape in group.items()}
    # Of all elements of experts a rank holds one part in ep_size.
    held = sum(
        prod(shape) for name, shape in local.items() if whole.whole(name, 0) in whole.experts
    )
    ep_size = sum(map(prod, whole.experts.values())) // held if held else 1
    names = Names(recipe.model, ep_size)
    is_strided = bool(_section(main, "ds_config").get("use_data_before_expert_parallelism"))
    found: dict[tuple[str, str], list[tuple[int, int, Tensor]]] = defaultdict(list)
    states = RunStates(0, len(paths), ep_size)
    for rank, path in enumerate(paths):
        ep_rank = rank // (len(paths) // ep_size) if is_strided else rank % ep_size
        content = _section(load_pickled(path, STAND_INS), "optimizer_state_dict")
        states.zero_stage = int(content["zero_stage"])
        states.loss_scale = _loss_scale(content)
        base = content["base_optimizer_state"]
        if not isinstance(base, dict):
            raise ConfigError(
                f"{path} is of an elastic checkpoint, without padding: save it with "
                "zero_optimization.elastic_checkpoint: false"
            )
        for number, addresses in enumerate(content["param_slice_mappings"]):
            group = base["param_groups"][number]
            state = {"fp32": content["single_partition_of_fp32_groups"][number]}
            state |= {"step": group["step"]} if "step" in group else {}
            state |= base["state"].get(group["params"][0], {})
            for local_name, address in addresses.items():
                name = names.whole(local_name, ep_rank)
                place = slice(address.start, address.start + address.numel)
                order = (ep_rank if name in names.experts else 0, rank)
                for key, value in state.items():
                    if isinstance(value, Tensor) and value.dim():
                        found[name, key].append((*order, value.view(-1)[place]))
                    else:
                        states.numbers[name][key] = _number(value)
    for (name, key), parts in found.items():
        parts.sort(key=lambda part: part[:2])
        states.parts[name][key] = [part for _, _, part in parts]
    return states


def _of_whole_states(
    contents: list[JsonObject], weights: Mapping[str, Tensor], world_size: int, recipe: Recipe
) -> RunStates:
    """ZeRO 0: a content for each rank among the experts' ranks."""
    names = Names(recipe.model, len(contents))
    local = names.of_a_rank()
    states = RunStates(0, world_size, len(contents))
    for ep_rank, content in enumerate(contents):
        base = content.get("optimizer_state_dict", content)
        masters = content.get("fp32_groups")
        states.loss_scale = {key: content[key] for key in COUNTS if key in content and masters}
        ordered = group_names(base["param_groups"], local, names, recipe)
        for number, (group, members) in enumerate(zip(base["param_groups"], ordered, strict=True)):
            for place, (index, local_name) in enumerate(zip(group["params"], members, strict=True)):
                name = names.whole(local_name, ep_rank)
                if ep_rank and name not in names.experts:
                    continue
                parts = states.parts[name]
                for key, value in base["state"].get(index, {}).items():
                    if not isinstance(value, Tensor) or value.dim() == 0:
                        states.numbers[name][key] = _number(value)
                        continue
                    if value.shape != local[local_name].shape:
                        raise CheckpointError(
                            f"'{key}' of '{name}' is {list(value.shape)} instead of "
                            f"{list(local[local_name].shape)}: {ORDER}"
                        )
                    parts[key].append(value)
                if masters is not None:
                    parts["fp32"].append(masters[number][place])
    # In fp32 the model's weights are those that the optimizer updates.
    for name, shape in (names.dense | names.experts).items():
        if "fp32" in states.parts[name]:
            continue
        if name in weights:
            states.parts[name]["fp32"] = [weights[name]]
        elif name in names.experts:
            stacked = (f"{name}.{number}" for number in range(shape[0]))
            states.parts[name]["fp32"] = [weights[key] for key in stacked if key in weights]
    return states


COUNTS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
ORDER = (
    "at ZeRO 0 DeepSpeed's files number states without naming parameters, and they are not in the "
    "model's order; save at ZeRO 1 or 2"
)


def group_names(
    groups: list[JsonObject], local: Mapping[str, Tensor], names: Names, recipe: Recipe
) -> list[list[str]]:
    """The parameters of each optimizer group at ZeRO 0, where the files do not name them.

    Groups may carry ``param_names``, as torch's do, or the roles of this project. Others are known
    if there is one group of dense parameters, or one of matrices and one of vectors; those of
    experts are marked with ``moe``. Within a group parameters have the model's order.

    Raises:
        ConfigError: if the groups are others.
    """
    if all("param_names" in group for group in groups):
        return [list(group["param_names"]) for group in groups]
    is_expert = {name: names.whole(name, 0) in names.experts for name in local}
    dense = [group for group in groups if not group.get("moe")]
    found = []
    for group in groups:
        wanted = bool(group.get("moe"))
        members = [name for name in local if is_expert[name] == wanted]
        if "role" in group:
            role = group["role"]
            members = [
                name for name in members if parameter_role(name, local[name], recipe.model) == role
            ]
        elif not wanted and len(dense) == 2:
            vectors = [name for name in members if local[name].dim() < 2]
            is_of_vectors = len(group["params"]) == len(vectors) and group is not dense[0]
            is_of_vectors |= len(dense[0]["params"]) == len(vectors) and group is dense[0]
            members = [name for name in members if (name in vectors) == is_of_vectors]
        found.append(members)
    counts = [len(group["params"]) for group in groups]
    if counts != [len(members) for members in found] or sum(counts) != len(local):
        raise ConfigError(
            f"the optimizer's {len(groups)} groups of {', '.join(map(str, counts))} parameters are "
            f"not known: {ORDER}"
        )
    return found


def _section(content: JsonObject, name: str) -> JsonObject:
    found = content.get(name)
    return found if isinstance(found, dict) else {}


def _loss_scale(content: JsonObject) -> dict[str, float]:
    counts = getattr(content.get("loss_scaler"), "__dict__", {})
    if not content.get("dynamic_loss_scale"):
        return {}
    return {key: counts[key] for key in COUNTS if key in counts}


def _number(value: Any) -> Tensor:
    """A number as files of this project hold it: a Python number in 64 bits."""
    if isinstance(value, Tensor):
        return value.reshape(())
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)
