"""Weights in a single file, as other training loops save them: a state dict by ``torch.save``, or
safetensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from pretrain.checkpoint.pickled import load_pickled
from pretrain.checkpoint.tensor_files import TensorReader
from pretrain.core.errors import CheckpointError
from pretrain.core.section import Section
from pretrain.model.config import ModelConfig
from pretrain.model.moe.config import EXPERT_NUMBER

# Where a dictionary keeps the model's state beside optimizers and counters.
WRAPPERS = ("model_state_dict", "state_dict", "model", "module")
# What wrappers of modules (DistributedDataParallel and DeepSpeed, torch.compile, FSDP,
# checkpointing) put into names.
WRAPPED = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
HUGGING_FACE = re.compile(r"^(model\.embed_tokens|model\.layers\.\d+|transformer\.(wte|h\.\d+))\.")
# An expert's share of a tensor that dropless layers stack: DeepSpeed's AutoEP names it w1.3, a list
# of feed-forwards 3.gate_proj.weight.
NUMBERED = re.compile(r"^(?P<stem>.*\.)experts\.(?P<matrix>w[123])\.(?P<expert>\d+)$")
LISTED = re.compile(
    r"^(?P<stem>.*\.)experts\.(?P<expert>\d+)\.(?P<parameter>(gate|up|down)_proj\.weight)$"
)
FILES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")

# Where a training loop keeps what its model is, next to the weights.
CONFIGS = ("config", "model_config", "model_args", "hyper_parameters", "hparams", "args", "recipe")
# Other loops' names of our fields.
ALIASES = {
    "n_embd": "hidden_size",
    "d_model": "hidden_size",
    "n_head": "num_attention_heads",
    "n_heads": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "n_kv_heads": "num_key_value_heads",
    "rope_base": "rope_theta",
    "rms_norm_eps": "norm.eps",
    "layer_norm_eps": "norm.eps",
    "norm_eps": "norm.eps",
    "num_experts_per_tok": "top_k",
}
# Names that say nothing without their section, and numbers that the tensors' names and shapes show.
VAGUE = {
    "kind",
    "bias",
    "eps",
    "limit",
    "alpha",
    "factor",
    "schedule",
    "score",
    "gate",
    "decode",
    "n",
    "k",
    "num_hidden_layers",
    "num_experts",
}
# Mappings inside each other that a configuration may have.
NESTED = 4

Read = Callable[[], Tensor]


def is_weights_file(path: Path) -> bool:
    """Whether ``initial_weights`` names a file of another training loop, and no folder of ours."""
    return path.suffix in FILES and not path.is_dir()


class FileWeights(Mapping[str, Tensor]):
    """The tensors of a file under this project's names, each read when it is asked for.

    Prefixes of wrapped modules are taken off wherever they stand, and a tied head's copy of the
    embedding is left out. Where the model stacks its experts, experts that the file has one by one
    are stacked.

    Attributes:
        shapes: of every tensor, by name; known without reading one.
        config: what the training loop saved of its model's configuration; empty without any.

    Raises:
        CheckpointError: for a file that is missing, damaged, dangerous or without tensors, and for
            two tensors of one name.
    """

    def __init__(self, path: Path, model: ModelConfig) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._readers: dict[str, list[Read]] = {}
        experts: dict[str, dict[int, tuple[tuple[int, ...], Read]]] = {}
        tensors, self.config = _content(path)
        for stored_name, shape, read in tensors:
            name = ".".join(part for part in stored_name.split(".") if part not in WRAPPED)
            if (place := _stacked_place(name, model)) is not None:
                experts.setdefault(place[0], {})[place[1]] = (shape, read)
            elif name in self.shapes:
                raise CheckpointError(
                    f"{path} has the tensor '{name}' twice, once as '{stored_name}': save the"
                    " model's state alone"
                )
            else:
                self.shapes[name], self._readers[name] = shape, [read]
        for name, shares in experts.items():
            found = [shares[number] for number in sorted(shares)]
            if sorted(shares) != list(range(len(shares))) or len({shape for shape, _ in found}) > 1:
                raise CheckpointError(
                    f"{path} has the experts {sorted(shares)} of '{name}', not all of them in one"
                    " shape: it is incomplete"
                )
            self.shapes[name], self._readers[name] = (
                (len(found), *found[0][0]),
                [read for _, read in found],
            )
        if HUGGING_FACE.match(next(iter(self.shapes), "")):
            raise CheckpointError(
                f"{path} has the names of a Hugging Face model: convert its folder with"
                " tools/convert_checkpoint.py --from hf FOLDER --output CHECKPOINT, and start from"
                " that"
            )
        tied = {"head.weight", "embedding.weight"} if model.tie_word_embeddings else set()
        if (
            tied
            and tied <= self.shapes.keys()
            and torch.equal(self["head.weight"], self["embedding.weight"])
        ):
            del self.shapes["head.weight"]

    def __getitem__(self, name: str) -> Tensor:
        shares = [read() for read in self._readers[name]]
        return shares[0] if self.shapes[name] == tuple(shares[0].shape) else torch.stack(shares)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def _stacked_place(name: str, model: ModelConfig) -> tuple[str, int] | None:
    """The stacked tensor that a tensor of one expert belongs to, and the expert's number."""
    if model.routing is None:
        return None
    parameters = model.feed_forward.parameter_names
    tensors = model.routing.expert_tensors(parameters)
    if any(EXPERT_NUMBER in tensor for names in tensors.values() for tensor in names):
        return None
    if match := NUMBERED.match(name):
        return f"{match['stem']}experts.{match['matrix']}", int(match["expert"])
    # A half of a matrix is no tensor that other loops have.
    if (match := LISTED.match(name)) and model.routing.keeps_matrices_whole(parameters):
        (stack,) = tensors.get(match["parameter"], ("",))
        return (f"{match['stem']}{stack}", int(match["expert"])) if stack else None
    return None


def _content(path: Path) -> tuple[list[tuple[str, tuple[int, ...], Read]], Mapping[str, Any]]:
    """The tensors of a file, name, shape and how to read them, and the configuration next to them."""
    if not path.is_file():
        raise CheckpointError(
            f"there is no file {path}: give a checkpoint's folder, or a file of weights"
        )
    if path.suffix == ".safetensors":
        reader = TensorReader([path])
        return [
            (name, reader.form(name).shape, partial(reader.read, name)) for name in reader.names
        ], _parsed(reader.metadata)
    content: object = load_pickled(path)
    config: Mapping[str, Any] = {}
    while isinstance(content, dict):
        config = config or next(
            (content[name] for name in CONFIGS if isinstance(content.get(name), dict)), {}
        )
        inside = next(
            (content[name] for name in WRAPPERS if isinstance(content.get(name), dict)), None
        )
        if inside is None:
            break
        content = inside
    tensors = (
        {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
        if isinstance(content, dict)
        else {}
    )
    if not tensors:
        raise CheckpointError(
            f"{path} holds no tensors by name, neither at its top nor under {', '.join(WRAPPERS)}:"
            " save the model's state_dict"
        )
    return [
        (name, tuple(value.shape), partial(tensors.__getitem__, name))
        for name, value in tensors.items()
    ], config


def _parsed(metadata: Mapping[str, str]) -> dict[str, Any]:
    """A safetensors file's texts, those that are JSON as what they say."""
    parsed: dict[str, Any] = {}
    for name, text in metadata.items():
        try:
            parsed[name] = json.loads(text)
        except (ValueError, RecursionError):
            parsed[name] = text
    return parsed


def model_of_config(config: Mapping[str, Any], model: ModelConfig) -> ModelConfig | None:
    """``model`` with every field as a training loop's configuration has it, as far as it names
    them.

    None if it names none.

    The names are Hugging Face's, which are ours, or those in ``ALIASES``; a recipe of ours names
    all of them.
    """
    try:
        ours = ModelConfig.model_validate(config.get("model", config))
        return ours if ours.vocab_size else ours.model_copy(update={"vocab_size": model.vocab_size})
    except ValidationError:
        pass  # another project's configuration
    named: dict[str, Any] = {}
    for section in _sections(config, NESTED):
        for name, value in section.items():
            named.setdefault(ALIASES.get(str(name), str(name)), value)
    known = 0

    def as_named(section: Section, path: str) -> Section:
        nonlocal known
        changed: dict[str, Any] = {}
        numbers = 0
        for name in type(section).model_fields:
            value, full = getattr(section, name), f"{path}{name}"
            given = named.get(full, None if name in VAGUE else named.get(name))
            if isinstance(value, Section):
                changed[name] = as_named(value, f"{full}.")
            elif isinstance(given, bool | int | float | str) and _alike(given, value):
                changed[name], numbers = given, numbers + 1
        content = {name: getattr(section, name) for name in type(section).model_fields} | changed
        try:
            named_section = type(section).model_validate(content)
        except ValidationError:
            return section  # nothing that could be a model
        known += numbers
        return named_section

    found = as_named(model, "")
    assert isinstance(found, ModelConfig)
    return found if known else None


def _sections(config: Mapping[str, Any], depth: int) -> Iterator[Mapping[str, Any]]:
    """The mapping and the mappings inside it to ``depth``, from the outside in."""
    yield config
    for value in config.values():
        if isinstance(value, Mapping) and depth:
            yield from _sections(value, depth - 1)


def _alike(given: bool | int | float | str, value: Any) -> bool:
    """Whether two values are of one type; whole numbers are numbers, and so is what a recipe leaves
    open.
    """
    if value is None:
        return isinstance(given, int | float) and not isinstance(given, bool)
    if isinstance(given, bool) or isinstance(value, bool):
        return isinstance(given, bool) and isinstance(value, bool)
    return isinstance(given, type(value)) or (
        isinstance(given, int | float) and isinstance(value, int | float)
    )
