"""Weights in a single file, as other training loops save them: a state dict by ``torch.save``, or safetensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from pretrain.checkpoint.pickled import load_pickled
from pretrain.checkpoint.tensor_files import TensorReader
from pretrain.config.errors import CheckpointError
from pretrain.config.model_schema import ModelConfig
from pretrain.config.moe_schema import DroplessMoE

# Where a dictionary keeps the model's state beside optimizers and counters.
WRAPPERS = ("model_state_dict", "state_dict", "model", "module")
# What wrappers of modules (DistributedDataParallel and DeepSpeed, torch.compile, FSDP, checkpointing) put into names.
WRAPPED = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
HUGGING_FACE = re.compile(r"^(model\.embed_tokens|model\.layers\.\d+|transformer\.(wte|h\.\d+))\.")
# An expert's share of a tensor that dropless layers stack: DeepSpeed's AutoEP names it w1.3, a list of feed-forwards 3.gate_proj.weight.
NUMBERED = re.compile(r"^(?P<stem>.*\.experts)\.(?P<matrix>w[123])\.(?P<expert>\d+)$")
LISTED = re.compile(r"^(?P<stem>.*\.experts)\.(?P<expert>\d+)\.(?P<matrix>gate_proj|up_proj|down_proj)\.weight$")
STACKED_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
FILES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")

Read = Callable[[], Tensor]


def is_weights_file(path: Path) -> bool:
    """Whether ``initial_weights`` names a file of another training loop, and no folder of ours."""
    return path.suffix in FILES and not path.is_dir()


class FileWeights(Mapping[str, Tensor]):
    """The tensors of a file under this project's names, each read when it is asked for.

    Prefixes of wrapped modules are taken off wherever they stand, and a tied head's copy of the embedding is left out. Where the model stacks
    its experts, experts that the file has one by one are stacked.

    Attributes:
        shapes: of every tensor, by name; known without reading one.

    Raises:
        CheckpointError: for a file that is missing, damaged, dangerous or without tensors, and for two tensors of one name.
    """

    def __init__(self, path: Path, model: ModelConfig) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._readers: dict[str, list[Read]] = {}
        experts: dict[str, dict[int, tuple[tuple[int, ...], Read]]] = {}
        for stored_name, shape, read in _tensors(path):
            name = ".".join(part for part in stored_name.split(".") if part not in WRAPPED)
            if (place := _stacked_place(name, model)) is not None:
                experts.setdefault(place[0], {})[place[1]] = (shape, read)
            elif name in self.shapes:
                raise CheckpointError(f"{path} has the tensor '{name}' twice, once as '{stored_name}': save the model's state alone")
            else:
                self.shapes[name], self._readers[name] = shape, [read]
        for name, shares in experts.items():
            found = [shares[number] for number in sorted(shares)]
            if sorted(shares) != list(range(len(shares))) or len({shape for shape, _ in found}) > 1:
                raise CheckpointError(f"{path} has the experts {sorted(shares)} of '{name}', not all of them in one shape: it is incomplete")
            self.shapes[name], self._readers[name] = (len(found), *found[0][0]), [read for _, read in found]
        if HUGGING_FACE.match(next(iter(self.shapes), "")):
            raise CheckpointError(
                f"{path} has the names of a Hugging Face model: convert its folder with "
                "tools/convert_checkpoint.py --from hf FOLDER --output CHECKPOINT, and start from that"
            )
        tied = {"head.weight", "embedding.weight"} if model.tie_word_embeddings else set()
        if tied and tied <= self.shapes.keys() and torch.equal(self["head.weight"], self["embedding.weight"]):
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
    if not isinstance(model.moe, DroplessMoE):
        return None
    if match := NUMBERED.match(name):
        return f"{match['stem']}.{match['matrix']}", int(match["expert"])
    # Without a gate the stacked tensors are halves of the one before the activation.
    if (match := LISTED.match(name)) and model.feed_forward.implementing_class().gated:
        return f"{match['stem']}.{STACKED_NAMES[match['matrix']]}", int(match["expert"])
    return None


def _tensors(path: Path) -> list[tuple[str, tuple[int, ...], Read]]:
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}: give a checkpoint's folder, or a file of weights")
    if path.suffix == ".safetensors":
        reader = TensorReader([path])
        return [(name, reader.form(name).shape, partial(reader.read, name)) for name in reader.names]
    content: object = load_pickled(path)
    while isinstance(content, dict) and (inside := next((content[name] for name in WRAPPERS if isinstance(content.get(name), dict)), None)):
        content = inside
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)} if isinstance(content, dict) else {}
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors by name, neither at its top nor under {', '.join(WRAPPERS)}: save the model's state_dict")
    return [(name, tuple(value.shape), partial(tensors.__getitem__, name)) for name, value in tensors.items()]
