"""Converts checkpoints of any DeepSpeed MoE model to safetensors with their own names.

DeepSpeed writes the dense part of a model to ``mp_rank_00_model_states.pt``, and each expert to a
separate file:

- ``layer_L_expert_E_mp_rank_00_model_states.pt``: in a native layer E's tensors are called
  ``...deepspeed_experts.E...``;
- the same file of an AutoEP layer (DeepSpeed 0.19.5 and later): they are called
  ``...experts.w1.E``, and are stacked again to ``...experts.w1``;
- ``expert_E_mp_rank_00_model_states.pt`` with expert E of all layers (before 0.5).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from pretrain.checkpoint.pickled import load_pickled, plain_tensors
from pretrain.checkpoint.tensor_headers import TensorForm
from pretrain.core.errors import CheckpointError, ConfigError
from pretrain.export.convert import Conversion
from pretrain.export.name_map import Link, Links, check_names, their_forms, to_theirs
from pretrain.export.parity import check_same_numbers
from pretrain.export.writer import (
    RECORD,
    SHARD_BYTES,
    dtype_name,
    open_exported_weights,
    published_folder,
    write_json_file,
    write_weights,
)

MODEL_FILE = re.compile(r"^mp_rank_([0-9]+)_model_states\.pt\Z")
EXPERT_FILE = re.compile(
    r"^(?:layer_(?P<layer>[0-9]+)_)?expert_(?P<expert>[0-9]+)_mp_rank_(?P<rank>[0-9]+)"
    r"_model_states\.pt\Z"
)
STACKED = re.compile(r"^(?P<stem>.*\.experts\.w[123])\.(?P<expert>[0-9]{1,9})\Z")
# A tag is the name of a folder: "global_step300".
TAG = re.compile(r"(?!\.)[\w.=-]{1,200}")
LARGEST_LATEST_BYTES = 1000
# No model has as many layers, or experts in one; a file that says so is damaged.
MOST = 100_000


class PickledTensors:
    """Tensors of several files that ``torch.save`` wrote, read one at a time.

    Pickles are read by an unpickler that runs no code of theirs.
    """

    def __init__(self) -> None:
        self._places: dict[str, tuple[Path, str | None]] = {}
        self._forms: dict[str, TensorForm] = {}

    @property
    def names(self) -> list[str]:
        """All names, in the order of the files."""
        return list(self._forms)

    def add(self, path: Path, section: str | None) -> None:
        """Adds the tensors of a file.

        Args:
            section: the key that they are under; None if they are at the top.

        Raises:
            CheckpointError: for a tensor that another file has too.
        """
        for name, tensor in tensors_of(path, section).items():
            if name in self._forms:
                raise CheckpointError(
                    f"the tensor '{name}' is both in {self._places[name][0].name} and in"
                    f" {path.name}: remove the file that does not belong there"
                )
            self._places[name] = (path, section)
            self._forms[name] = TensorForm(tensor.dtype, tuple(tensor.shape))

    def form(self, name: str) -> TensorForm:
        """A tensor's dtype and shape."""
        return self._forms[name]

    def read(self, name: str, index: int | None = None) -> Tensor:
        """A tensor, or one of its slices along the first dimension."""
        tensor = tensors_of(*self._places[name])[name]
        # A copy: a view would keep the whole file in memory.
        return tensor.clone() if index is None else tensor[index].clone()


def import_deepspeed(
    source: Path, output: Path, dtype: torch.dtype, overwrite: bool, shard_bytes: int = SHARD_BYTES
) -> Conversion:
    """Writes all weights of a DeepSpeed MoE checkpoint as safetensors, with all experts joined.

    Args:
        source: the folder of a tag, such as ``global_step300``, or the one above it with the file
            ``latest``.
        dtype: of the written floating weights. DeepSpeed's model files hold them in the precision
            of training.

    Raises:
        ConfigError: for a layout that does not hold whole weights (ZeRO stage 3, tensor
            parallelism), or if ``output`` is taken.
        CheckpointError: for a missing, superfluous, doubled or damaged file, by name, and for
            pickles that do more than hold tensors.
    """
    folder = tag_folder(source)
    tensors = PickledTensors()
    main = model_file(folder)
    counts = load_pickled(main).get("num_experts")
    tensors.add(main, "module")
    for path in expert_files(folder, checked_counts(main, counts)):
        tensors.add(path, None)
    links = _links(tensors)
    check_names(links, tensors)
    with published_folder(output, overwrite) as temporary:
        forms = their_forms(links, tensors, dtype)
        write_weights(temporary, forms, to_theirs(links, tensors, dtype), shard_bytes)
        check_same_numbers(links, tensors, open_exported_weights(temporary))
        size = sum(form.bytes for form in forms.values())
        conversion = Conversion(
            "safetensors", _step(main), dtype_name(dtype), len(forms), size, None
        )
        write_json_file(temporary / RECORD, conversion.to_dict())
    return conversion


def _links(tensors: PickledTensors) -> Links:
    links: Links = []
    experts: dict[str, list[int]] = {}
    for name in tensors.names:
        match = STACKED.match(name)
        if match is None:
            links.append(Link(name, name))
            continue
        experts.setdefault(match["stem"], []).append(int(match["expert"]))
        links.append(Link(name, match["stem"], their_expert=int(match["expert"])))
    for stem, found in experts.items():
        # A gap is a lost file: DeepSpeed numbers the experts of a layer from 0 over all ranks.
        if sorted(found) != list(range(len(found))):
            raise CheckpointError(
                f"'{stem}' has the experts {sorted(found)}: some are missing, the checkpoint is"
                " damaged"
            )
    return links


def tag_folder(source: Path) -> Path:
    """The folder of the files: ``source``, or what ``latest`` in it names.

    Raises:
        CheckpointError: if there is none.
    """
    latest = source / "latest"
    folder = source
    if os.path.lexists(latest):
        # A pipe would block, and a link may lead to any file.
        plain = latest.is_file() and latest.stat().st_size < LARGEST_LATEST_BYTES
        tag = latest.read_text(encoding="utf-8", errors="replace").strip() if plain else ""
        folder = source / tag
        if not TAG.fullmatch(tag) or folder.is_symlink():
            raise CheckpointError(f"{latest} names no folder beside it: give the folder of a tag")
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}: give one of DeepSpeed's checkpoints")
    return folder


def checked_counts(main: Path, counts: object) -> list[int]:
    """The number of experts of each MoE layer; empty if the file does not have it.

    Raises:
        CheckpointError: if these are no such numbers.
    """
    if not isinstance(counts, list):
        return []
    # bool is an int in Python.
    if len(counts) > MOST or not all(type(each) is int and 0 <= each <= MOST for each in counts):
        raise CheckpointError(
            f"{main} has num_experts that are no numbers of experts: the checkpoint is damaged"
        )
    return counts


def model_file(folder: Path) -> Path:
    """The file of the dense weights.

    Raises:
        ConfigError: if there are several, or those of ZeRO 3.
        CheckpointError: if there is none.
    """
    found = sorted(path for path in folder.iterdir() if MODEL_FILE.match(path.name))
    # ZeRO 3 writes a part of each weight per rank, under these names.
    if list(folder.glob("*zero_pp_rank_*_model_states.pt")):
        raise ConfigError(
            f"{folder} is of ZeRO stage 3, whose model files hold no whole weights: run DeepSpeed's"
            " zero_to_fp32.py on it first"
        )
    if not found:
        raise CheckpointError(
            f"{folder} has no mp_rank_00_model_states.pt: give the folder of one of DeepSpeed's"
            " checkpoints"
        )
    if len(found) > 1:
        raise ConfigError(
            f"{folder} has the shares of {len(found)} tensor-parallel ranks: merge them with the"
            " program that trained it first"
        )
    return found[0]


def expert_files(folder: Path, counts: list[int]) -> Iterator[Path]:
    """The files of all experts: each layer's from 0 on, none missing.

    Args:
        counts: experts of each MoE layer as the checkpoint has it; empty if it does not.
    """
    files: dict[tuple[int, int], Path] = {}
    layered = set()
    for path in sorted(folder.iterdir()):
        if (match := EXPERT_FILE.match(path.name)) is None:
            continue
        if int(match["rank"]):
            raise ConfigError(
                f"{path} is a tensor-parallel share of an expert: merge them with the program that"
                " trained it first"
            )
        layered.add(match["layer"] is not None)
        place = int(match["layer"] or 0), int(match["expert"])
        # One layer's and all layers' files of an expert have one place: they are named below.
        if max(place) > MOST or (place in files and len(layered) == 1):
            raise CheckpointError(
                f"{path} is of an expert that the checkpoint cannot have: remove it"
            )
        files[place] = path
    if len(layered) > 1:
        raise CheckpointError(
            f"{folder} has files of single layers' experts and of all layers' beside each other:"
            " remove those of another checkpoint"
        )
    if layered == {False}:
        counts = [max(counts)] if counts else []
    if not counts:
        last: dict[int, int] = {}
        for layer, expert in files:
            last[layer] = max(last.get(layer, 0), expert)
        counts = [last.get(layer, -1) + 1 for layer in range(max(last, default=-1) + 1)]
    # Found before it is counted: the numbers may be far larger than what is there.
    places = ((layer, expert) for layer, count in enumerate(counts) for expert in range(count))
    lacking = next((place for place in places if place not in files), None)
    stray = sorted(
        place for place in files if place[0] >= len(counts) or place[1] >= counts[place[0]]
    )
    if lacking is not None:
        missing = sum(counts) - (len(files) - len(stray))
        raise CheckpointError(
            f"{folder} lacks expert {lacking[1]} of MoE layer {lacking[0]} ({missing} missing): the"
            " checkpoint is incomplete"
        )
    if stray:
        raise CheckpointError(
            f"{files[stray[0]]} is of an expert that the checkpoint does not have: remove it, it"
            " belongs to another one"
        )
    yield from (files[key] for key in sorted(files))


def tensors_of(
    path: Path, section: str | None, stand_ins: Mapping[str, type] | None = None
) -> dict[str, Tensor]:
    """The tensors of a file, which stay in it until they are read.

    Args:
        section: the key that they are under; None if they are at the top.
        stand_ins: see :func:`load_pickled`.

    Raises:
        CheckpointError: if the file is damaged or another one.
    """
    content = load_pickled(path, stand_ins)
    tensors = content if section is None else content.get(section)
    if not isinstance(tensors, dict):
        raise CheckpointError(f"{path} has no '{section}': it is no model file of DeepSpeed's")
    return plain_tensors(path, tensors)


def _step(main: Path) -> int:
    step = load_pickled(main).get("global_steps", 0)
    return step if isinstance(step, int) else 0
