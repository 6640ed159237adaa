"""Weights in a single file, as other training loops save them.

That is a state dict by ``torch.save``, or safetensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from pretrain.checkpoint.pickled import load_pickled, plain_tensors
from pretrain.checkpoint.tensor_files import TensorReader
from pretrain.core.errors import CheckpointError
from pretrain.core.files import JsonObject
from pretrain.core.section import Section
from pretrain.model.config import ModelConfig
from pretrain.model.moe.config import EXPERT_NUMBER

# Keys under which a dictionary keeps the model's state, next to optimizers and counters.
WRAPPERS = ("model_state_dict", "state_dict", "model", "module")
# What wrappers of modules (DistributedDataParallel and DeepSpeed, torch.compile, FSDP,
# checkpointing) put into names.
WRAPPED = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
HUGGING_FACE = re.compile(r"^(model\.embed_tokens|model\.layers\.\d+|transformer\.(wte|h\.\d+))\.")
# One expert's part of a tensor that dropless layers stack: w1.3 in DeepSpeed's AutoEP,
# 3.gate_proj.weight in a list of feed-forwards.
NUMBERED = re.compile(r"^(?P<stem>.*\.)experts\.(?P<matrix>w[123])\.(?P<expert>\d+)$")
LISTED = re.compile(
    r"^(?P<stem>.*\.)experts\.(?P<expert>\d+)\.(?P<parameter>(gate|up|down)_proj\.weight)$"
)
FILES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")

# Keys under which a training loop keeps its model's configuration, next to the weights.
CONFIGS = ("config", "model_config", "model_args", "hyper_parameters", "hparams", "args", "recipe")
# Other loops' names of this project's fields.
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
# Names that mean nothing without their section, and counts that the tensors' names and shapes show.
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
# How deep the sections of a configuration are looked through, and how deep wrappers are nested.
NESTED = 4
MOST_WRAPPERS = 8
SCALARS = bool | int | float | str

Shape = tuple[int, ...]
Read = Callable[[], Tensor]
# Name, shape, and how to read it.
Entry = tuple[str, Shape, Read]


def is_weights_file(path: Path) -> bool:
    """Whether ``initial_weights`` names a file of another training loop, not a checkpoint."""
    return path.suffix in FILES and not path.is_dir()


class FileWeights(Mapping[str, Tensor]):
    """The tensors of a file under this project's names, each read when it is asked for.

    Prefixes of wrapped modules are removed at every level, and a tied head's copy of the embedding
    is left out. If the model stacks its experts, experts that the file has one by one are stacked.

    Attributes:
        shapes: of every tensor, by name; known without reading one.
        config: the model's configuration as the training loop saved it; empty if it did not.

    Raises:
        CheckpointError: for a file that is missing, damaged, dangerous or without tensors, and for
            two tensors of one name.
    """

    def __init__(self, path: Path, model: ModelConfig) -> None:
        self.shapes: dict[str, Shape] = {}
        self._readers: dict[str, list[Read]] = {}
        experts: dict[str, dict[int, tuple[Shape, Read]]] = {}
        tensors, self.config = _content(path)
        for stored_name, shape, read in tensors:
            name = ".".join(part for part in stored_name.split(".") if part not in WRAPPED)
            if (place := _stacked_place(name, model)) is not None:
                stack, number = place
                experts.setdefault(stack, {})[number] = (shape, read)
            elif name in self.shapes:
                raise CheckpointError(
                    f"{path} has the tensor '{name}' twice, once as '{stored_name}': "
                    "save the model's state alone"
                )
            else:
                self.shapes[name] = shape
                self._readers[name] = [read]
        # Only now all experts of a layer are known.
        for name, shares in experts.items():
            self._stack(path, name, shares)
        if HUGGING_FACE.match(next(iter(self.shapes), "")):
            raise CheckpointError(
                f"{path} has the names of a Hugging Face model: convert its folder with "
                "tools/convert_checkpoint.py --from hf FOLDER --output CHECKPOINT, "
                "and start from that"
            )
        if model.tie_word_embeddings:
            self._drop_tied_head()

    def _drop_tied_head(self) -> None:
        """Leave the head out if it is a copy of the embedding.

        Two different matrices do not fit a tied model: then the head stays, and is reported.
        """
        has_both = {"head.weight", "embedding.weight"} <= self.shapes.keys()
        if has_both and torch.equal(self["head.weight"], self["embedding.weight"]):
            del self.shapes["head.weight"]

    def _stack(self, path: Path, name: str, shares: dict[int, tuple[Shape, Read]]) -> None:
        """Make one tensor of the experts' parts."""
        numbers = sorted(shares)
        shapes = {shape for shape, _ in shares.values()}
        if numbers != list(range(len(shares))) or len(shapes) > 1:
            raise CheckpointError(
                f"{path} has the experts {numbers} of '{name}', not all of them in one shape: "
                "it is incomplete"
            )
        self.shapes[name] = (len(shares), *shapes.pop())
        self._readers[name] = [shares[number][1] for number in numbers]

    def __getitem__(self, name: str) -> Tensor:
        shares = [read() for read in self._readers[name]]
        # A stack of one expert has one reader too, but another shape.
        return shares[0] if self.shapes[name] == tuple(shares[0].shape) else torch.stack(shares)

    def read_range(self, name: str, start: int, stop: int) -> Tensor:
        """The elements ``start`` to ``stop`` (excluded) of a tensor, flat.

        Of a stack, only those of its tensors are read that have some of them, one at a time.
        """
        readers = self._readers[name]
        # All tensors of a stack have one shape.
        size = prod(self.shapes[name]) // len(readers)
        parts = []
        for index, read in enumerate(readers):
            begin, end = max(start - index * size, 0), min(stop - index * size, size)
            if begin < end:
                part = read().reshape(-1)[begin:end]
                # A view would keep the whole tensor until the last one is read.
                parts.append(part if len(readers) == 1 else part.clone())
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def _stacked_place(name: str, model: ModelConfig) -> tuple[str, int] | None:
    """Return the stacked tensor that a tensor of one expert belongs to, and the expert's number.

    None for any other tensor, and if the model does not stack its experts.
    """
    if model.routing is None:
        return None
    parameters = model.feed_forward.parameter_names
    tensors = model.routing.expert_tensors(parameters)
    if any(EXPERT_NUMBER in tensor for names in tensors.values() for tensor in names):
        return None
    if match := NUMBERED.match(name):
        return f"{match['stem']}experts.{match['matrix']}", int(match["expert"])
    # A model may keep a matrix in two halves, which no tensor of other loops is.
    if (match := LISTED.match(name)) and model.routing.keeps_matrices_whole(parameters):
        (stack,) = tensors.get(match["parameter"], ("",))
        return (f"{match['stem']}{stack}", int(match["expert"])) if stack else None
    return None


def _content(path: Path) -> tuple[list[Entry], JsonObject]:
    """Return an entry for each tensor of a file, and the configuration next to them."""
    if not path.is_file():
        raise CheckpointError(
            f"there is no file {path}: give a checkpoint's folder, or a file of weights"
        )
    if path.suffix == ".safetensors":
        reader = TensorReader([path])
        stored: list[Entry] = [
            (name, reader.form(name).shape, partial(reader.read, name)) for name in reader.names
        ]
        return stored, _parsed(reader.metadata)
    content = load_pickled(path)
    config: JsonObject = {}
    # Follow the wrappers inwards; the outermost configuration holds. A dictionary may be inside
    # itself.
    for _ in range(MOST_WRAPPERS):
        config = config or _first_dictionary(content, CONFIGS) or {}
        inside = _first_dictionary(content, WRAPPERS)
        if inside is None:
            break
        content = inside
    tensors = plain_tensors(path, content)
    if not tensors:
        raise CheckpointError(
            f"{path} holds no tensors by name, neither at its top nor under {', '.join(WRAPPERS)}: "
            "save the model's state_dict"
        )
    pickled: list[Entry] = [
        (name, tuple(value.shape), partial(tensors.__getitem__, name))
        for name, value in tensors.items()
    ]
    return pickled, config


def _first_dictionary(content: JsonObject, names: Sequence[str]) -> JsonObject | None:
    """Return the first dictionary under one of the names; None if there is none."""
    return next((content[name] for name in names if isinstance(content.get(name), dict)), None)


def _parsed(metadata: Mapping[str, str]) -> JsonObject:
    """Return the strings of a safetensors file, those that are JSON decoded."""
    parsed: JsonObject = {}
    for name, text in metadata.items():
        try:
            parsed[name] = json.loads(text)
        except (ValueError, RecursionError):
            parsed[name] = text
    return parsed


def model_of_config(config: JsonObject, model: ModelConfig) -> ModelConfig | None:
    """Return ``model`` with every field that a training loop's configuration names.

    None if it names none. The names are those of this project, which are Hugging Face's, or those
    in ``ALIASES``. A recipe of this project names all fields.
    """
    try:
        saved = ModelConfig.model_validate(config.get("model", config))
    except ValidationError:
        pass  # another project's configuration
    else:
        if saved.vocab_size:
            return saved
        return saved.model_copy(update={"vocab_size": model.vocab_size})
    named: JsonObject = {}
    # The outermost mention of a name holds.
    for section in _sections(config, NESTED):
        for name, value in section.items():
            named.setdefault(ALIASES.get(str(name), str(name)), value)
    known = 0

    def as_named(section: Section, path: str) -> Section:
        nonlocal known
        content: JsonObject = {}
        count = 0
        for name in type(section).model_fields:
            value = getattr(section, name)
            full_name = f"{path}{name}"
            saved_value = named.get(full_name, None if name in VAGUE else named.get(name))
            content[name] = value
            if isinstance(value, Section):
                content[name] = as_named(value, f"{full_name}.")
            elif isinstance(saved_value, SCALARS) and _alike(saved_value, value):
                content[name] = saved_value
                count += 1
        try:
            named_section = type(section).model_validate(content)
        except ValidationError:
            return section  # together, these values are no model
        known += count
        return named_section

    found = as_named(model, "")
    assert isinstance(found, ModelConfig)
    return found if known else None


def _sections(config: JsonObject, depth: int) -> Iterator[JsonObject]:
    """Yield the mapping and the mappings inside it to ``depth``, from the outside in."""
    # Level by level, each once: a file may name one mapping a thousand times at every level.
    seen: set[int] = set()
    level = [config]
    for _ in range(depth + 1):
        yield from level
        seen.update(map(id, level))
        inside = {
            id(value): value
            for section in level
            for value in section.values()
            if isinstance(value, dict) and id(value) not in seen
        }
        level = list(inside.values())


def _alike(saved: bool | int | float | str, value: object) -> bool:
    """Whether a saved value is of the type of a recipe's value.

    int and float are one type here. A value that a recipe leaves open (None) is a number.
    """
    if value is None:
        return isinstance(saved, int | float) and not isinstance(saved, bool)
    # bool is an int in Python, and must not pass for one.
    if isinstance(saved, bool) or isinstance(value, bool):
        return isinstance(saved, bool) and isinstance(value, bool)
    return isinstance(saved, type(value)) or (
        isinstance(saved, int | float) and isinstance(value, int | float)
    )
