"""The way back: a Hugging Face folder as a recipe and a checkpoint of weights alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
import torch

from pretrain.checkpoint.layout import TOKENIZER
from pretrain.checkpoint.tensor_files import TensorReader
from pretrain.checkpoint.weights import open_weights
from pretrain.checkpoint.weights_folder import fill_weights_folder, tensor_shapes
from pretrain.config.errors import CheckpointError, ConfigError
from pretrain.config.load import validate_recipe
from pretrain.config.schema import Recipe
from pretrain.export.architectures.llama_like import LlamaLike
from pretrain.export.convert import Conversion, shortage
from pretrain.export.hf_files import CONFIG, read_config
from pretrain.export.hf_open import check_stored, open_config
from pretrain.export.name_map import Links, Zeros, to_ours
from pretrain.export.parity import check_parity, check_same_numbers, compare_logits, load_exported, reference_model, same_bits
from pretrain.export.targets import ARCHITECTURES
from pretrain.export.writer import RECORD, dtype_name, open_exported_weights, published_folder, write_json_file

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Fields of config.json that change nothing of what the model computes, or that a recipe says in its own way.
NEUTRAL = {
    "architectures",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "initializer_range",
    "num_nextn_predict_layers",
    "output_router_logits",
    "pretraining_tp",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "transformers_version",
    "use_cache",
    # Qwen's, without use_sliding_window, which is compared.
    "max_window_layers",
    "sliding_window_pattern",
    # One pattern of dense layers can be said in two ways; sparse_layers reads both and refuses what recipes cannot say.
    "decoder_sparse_step",
    "mlp_only_layers",
}
NO_WEIGHTS = re.compile(r"rotary_emb\.inv_freq$")
WINDOWS, WINDOW_TOKENS = 4, 256


class _Fields(Mapping[str, Any]):
    """A config's fields with transformers' defaults, under every name that transformers knows them by."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config = config

    def __getitem__(self, name: str) -> Any:
        if not hasattr(self.config, name):
            raise KeyError(name)
        return getattr(self.config, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.config.to_dict())

    def __len__(self) -> int:
        return len(self.config.to_dict())


def import_hf(source: Path, output: Path, overwrite: bool, memory_bytes: int | None = None) -> Conversion:
    """Writes a folder that evaluation, generation, export and training read like any other checkpoint, and compares its logits with transformers'.

    Args:
        source: with ``config.json``, safetensors and, if it has one, ``tokenizer.json``.
        memory_bytes: as in :func:`pretrain.export.convert.export_hf`.

    Raises:
        ConfigError: when a recipe cannot say what the model computes, or ``output`` is taken.
        CheckpointError: when weights are missing, superfluous or damaged, or numbers differ; ``output`` is then left as it was.
    """
    target, config = _architecture(source)
    recipe = _recipe(source, output, target, config)
    check_stored(source)
    theirs = open_exported_weights(source)
    links = target.links(recipe.model)
    left_out = _left_out(theirs, links, recipe)
    dense, experts = tensor_shapes(recipe.model)
    tokenizer = source / TOKENIZER
    with published_folder(output, overwrite) as folder:
        tensors = to_ours(links, theirs, dense | experts)
        fill_weights_folder(folder, recipe, tensors, tokenizer if tokenizer.is_file() else None)
        ours = open_weights(folder)
        check_same_numbers([link for link in links if not isinstance(link, Zeros)], ours, theirs)
        parity, unchecked = None, shortage(ours, memory_bytes)
        if unchecked is None:
            shape = (WINDOWS, min(WINDOW_TOKENS, recipe.model.max_position_embeddings))
            windows_WS = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
            parity = compare_logits(reference_model(recipe.model, ours, torch.float32), load_exported(source), windows_WS)
            check_parity(parity)
        dtypes = {theirs.form(name).dtype for name in theirs.names}
        dtype = dtype_name(dtypes.pop()) if len(dtypes) == 1 else "mixed"
        size = sum(ours.form(name).bytes for name in ours.names)
        conversion = Conversion(recipe.name, 0, dtype, len(ours.names), size, parity, unchecked, left_out)
        write_json_file(folder / RECORD, conversion.to_dict())
    return conversion


def _architecture(source: Path) -> tuple[LlamaLike, PreTrainedConfig]:
    path, content = source / CONFIG, read_config(source)
    name = content["model_type"]
    known = {target.name: target for target in ARCHITECTURES}
    if name not in known:
        raise ConfigError(f"{path} has the model_type {name!r}, and the ones that recipes can say are {', '.join(known)}")
    if content.get("quantization_config"):
        raise ConfigError(f"{path} says that the weights are quantised: convert them to bf16 or fp32 first, with the tool that quantised them")
    return known[name], open_config(source)


def _recipe(source: Path, output: Path, target: LlamaLike, config: PreTrainedConfig) -> Recipe:
    """A recipe whose model is that of ``config``; what it says of training is a beginning to be changed.

    Raises:
        ConfigError: naming a field of ``config`` that no recipe can say.
    """
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", source.resolve().name).lstrip("._-") or target.name
    content = {
        "name": name,
        "data": {"tokenizer": _tokenizer_section(source, output, config)},
        "model": _model_section(source, target, config),
        "train": {
            "sequence_length": min(config.max_position_embeddings, 4096),
            "micro_batch_size": 1,
            "global_batch_size": 8,
            "train_tokens": 1_000_000_000,
        },
        "optimizer": {"kind": "adamw", "learning_rate": 1e-5},
    }
    recipe = validate_recipe(content, str(source / "config.json"))
    if reasons := target.reasons_against(recipe.model):
        raise ConfigError(f"{source / 'config.json'} describes what {target.name} is not: {'; '.join(reasons)}")
    again = type(config)(**target.config(recipe.model, 0)).to_dict()
    for field, value in config.to_dict().items():
        if field in again and field not in NEUTRAL and not field.startswith("_") and _canonical(again[field]) != _canonical(value):
            raise ConfigError(
                f"{source / 'config.json'} says {field} = {value}, and the nearest recipe would be {again[field]}: it cannot be converted exactly"
            )
    return recipe


def _model_section(source: Path, target: LlamaLike, config: PreTrainedConfig) -> dict[str, Any]:
    try:
        return target.model_section(_Fields(config))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # fields of the wrong type, or none
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{source / CONFIG} is no config of {target.name} ({type(error).__name__}: {reason}): take another folder") from None


def _canonical(value: Any) -> Any:
    """Rope parameters without what stands there for older readers or changes nothing."""
    if not isinstance(value, dict):
        return value
    return {key: item for key, item in value.items() if item is not None and key not in ("type", "partial_rotary_factor")} | {
        "partial_rotary_factor": value.get("partial_rotary_factor", 1.0)
    }


def _tokenizer_section(source: Path, output: Path, config: PreTrainedConfig) -> dict[str, Any]:
    if not (source / TOKENIZER).is_file():
        return {"kind": "train_bpe"}
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(source / TOKENIZER))
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{source / TOKENIZER} is no tokenizer ({error}): copy the model's own there") from None
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= config.vocab_size:
        raise CheckpointError(f"{source / TOKENIZER} has ids up to {largest}, and the model a vocab_size of {config.vocab_size}: copy its own there")
    eos = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    section = {"kind": "file", "path": str(output / TOKENIZER)}
    token = None if eos is None else tokenizer.id_to_token(eos)
    return section if token is None else section | {"eod_token": token}


def _left_out(theirs: TensorReader, links: Links, recipe: Recipe) -> tuple[str, ...]:
    """Tensors that no next token depends on: blocks of multi-token prediction, shared experts of width zero, a tied head's copy.

    Raises:
        CheckpointError: for any other that no link names.
    """
    linked = {link.theirs for link in links if not isinstance(link, Zeros)}
    empty = {link.theirs for link in links if isinstance(link, Zeros)}
    layers = recipe.model.num_hidden_layers
    left_out = []
    for name in theirs.names:
        if name in linked or NO_WEIGHTS.search(name):
            continue
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if name == "lm_head.weight" and same_bits(theirs.read(name), theirs.read("model.embed_tokens.weight")):
            continue
        if name not in empty and not (layer and int(layer[1]) >= layers):
            raise CheckpointError(f"the tensor '{name}' has no place in the recipe's model: config.json and weights do not belong together")
        if name not in empty or theirs.read(name).any():
            left_out.append(name)
    return tuple(left_out)
