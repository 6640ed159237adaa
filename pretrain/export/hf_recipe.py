"""Converts a Hugging Face ``config.json`` to a recipe, and refuses what no recipe can express."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
import torch
from huggingface_hub.errors import StrictDataclassError

from pretrain.checkpoint.layout import TOKENIZER
from pretrain.config.load import validate_recipe
from pretrain.config.recipe import Recipe
from pretrain.core.errors import CheckpointError, ConfigError
from pretrain.core.files import JsonObject
from pretrain.core.plugins import add_loaded_plugins
from pretrain.export.architectures.llama_like import LlamaLike
from pretrain.export.architectures.rope import resolved
from pretrain.export.hf_files import TOKENIZER_CONFIG, unset_fields
from pretrain.export.hf_tokenizer import TokenIds, sentencepiece_section, source_tokenizer
from pretrain.export.writer import read_json_object

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# What transformers raises for a config that it cannot make sense of; some classes look into values
# before they check their types.
REFUSALS = (
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    IndexError,
    ArithmeticError,
    StrictDataclassError,
    AssertionError,
    RuntimeError,
)
# Fields of config.json that do not change what the model computes, or that a recipe expresses in
# another way.
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
    # Two ways to write a pattern of dense layers; sparse_layers reads both, and refuses patterns
    # that recipes do not have.
    "decoder_sparse_step",
    "mlp_only_layers",
}
# Fields that transformers' shared code reads even if a class does not declare them, with the value
# that changes nothing.
READ_ANYWHERE: JsonObject = {
    "attention_chunk_size": None,
    "head_dim": None,
    "is_causal": True,
    "kv_sharing_modes": None,
    "layer_types": None,
    "per_layer_config": None,
    "sliding_window": None,
}


class _Fields(Mapping[str, Any]):
    """A config's fields with transformers' defaults, under every name that transformers accepts.

    ``fields[name]`` raises :class:`ConfigError` for a null, ``fields.get(name)`` returns it.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config = config

    def __getitem__(self, name: str) -> Any:
        if not hasattr(self.config, name):
            raise KeyError(name)
        if (value := getattr(self.config, name)) is None:
            raise ConfigError(
                f"config.json says {name} = null, which {self.config.model_type} cannot compute"
                " with: give it a value"
            )
        return value

    def get(self, name: str, default: Any = None) -> Any:
        """The value, which may be None."""
        return getattr(self.config, name, default)

    def __iter__(self) -> Iterator[str]:
        return iter(self.config.to_dict())

    def __len__(self) -> int:
        return len(self.config.to_dict())


def recipe_of(source: Path, output: Path, target: LlamaLike, config: PreTrainedConfig) -> Recipe:
    """A recipe with the model of ``config``; its training section is only a start, to be changed.

    Args:
        source: the folder of ``config``, for the recipe's name, the tokenizer and errors.
        output: the folder that will have the tokenizer.

    Raises:
        ConfigError: for a field of ``config`` that no recipe can express, or that transformers' own
            class cannot compute with.
    """
    path = source / "config.json"
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", source.resolve().name).lstrip("._-") or target.name
    _check_undeclared(path, config)
    tokens = TokenIds(
        config.vocab_size, config.bos_token_id, config.eos_token_id, config.pad_token_id
    )
    content = {
        "name": name,
        "data": {"tokenizer": tokenizer_section(source, output, tokens)},
        "model": _model_section(path, target, config),
        "train": {
            "sequence_length": min(config.max_position_embeddings, 4096),
            "micro_batch_size": 1,
            "global_batch_size": 8,
            "train_tokens": 1_000_000_000,
        },
        "optimizer": {"kind": "adamw", "learning_rate": 1e-5},
    }
    add_loaded_plugins(content)
    recipe = validate_recipe(content, str(path))
    if reasons := target.reasons_against(recipe.model):
        raise ConfigError(f"{path} describes what {target.name} is not: {'; '.join(reasons)}")
    # The check of the whole conversion: exported again, the recipe must give the same config.
    exported = _resolved(type(config)(**target.config(recipe.model, 0)))
    unread = NEUTRAL | target.unread(_Fields(config))
    for field, value in _resolved(config).items():
        if (
            field not in unread
            and not field.startswith("_")
            and field in exported
            and exported[field] != value
        ):
            setting, nearest = _difference(field, value, exported[field])
            raise ConfigError(
                f"{path} says {setting}, and the nearest recipe would be {nearest}: it cannot be"
                " converted exactly"
            )
    _check_buildable(path, target, config)
    return recipe


def _model_section(path: Path, target: LlamaLike, config: PreTrainedConfig) -> JsonObject:
    try:
        return target.model_section(_Fields(config))
    # Fields that are missing or of a wrong type.
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path} is no config of {target.name} ({type(error).__name__}: {reason}): take another"
            " folder"
        ) from None


def _check_undeclared(path: Path, config: PreTrainedConfig) -> None:
    """Refuses fields that the class does not declare, but that transformers' shared code reads."""
    declared = {field.name for field in dataclasses.fields(config)}
    written = config.to_dict()
    for field, harmless in READ_ANYWHERE.items():
        if field in declared or field not in written or field in type(config).attribute_map:
            continue
        value = written[field]
        if field == "head_dim" and value is not None:
            continue  # read by every class; recipes have it
        if field == "head_dim" or value != harmless:
            raise ConfigError(
                f"{path} says {field} = {value}, which {config.model_type} has no meaning for: take"
                " it out of the file"
            )


def _check_buildable(path: Path, target: LlamaLike, config: PreTrainedConfig) -> None:
    """Checks that transformers' own class takes the config, without memory for weights."""
    import transformers

    try:
        with torch.device("meta"):
            getattr(transformers, target.architecture)(config)
    except REFUSALS as error:
        raise ConfigError(
            f"transformers cannot build the model of {path}:"
            f" {' '.join(str(error).split())[:300]}{unset_fields(config.to_dict())}"
        ) from None


def _resolved(config: PreTrainedConfig) -> JsonObject:
    """The fields with what transformers' class computes for those that are null or left out."""
    fields: JsonObject = config.to_dict()
    declared = {field.name for field in dataclasses.fields(config)}
    if "rope_parameters" in fields:
        fields["rope_parameters"] = resolved(
            fields["rope_parameters"], config.max_position_embeddings
        )
    if "head_dim" in declared and fields.get("head_dim") is None:
        fields["head_dim"] = config.hidden_size // config.num_attention_heads
    return fields


def _difference(field: str, value: Any, exported: Any) -> tuple[str, str]:
    """A field with each of two values, as ``config.json`` writes them; the first that differs."""
    if isinstance(value, dict) and isinstance(exported, dict):
        for name in (*value, *exported):
            if value.get(name) != exported.get(name):
                return f"{field}.{name} = {value.get(name)}", str(exported.get(name))
    return f"{field} = {value}", str(exported)


def tokenizer_section(source: Path, output: Path, config: TokenIds) -> JsonObject:
    """The tokenizer's section of a recipe, for the file in ``source`` whose copy is in ``output``.

    Raises:
        CheckpointError: if it is damaged, or has more entries than the model.
    """
    path = source_tokenizer(source)
    if path is None:
        return {"kind": "train_bpe"}
    if path.name != TOKENIZER:
        return sentencepiece_section(path, output, config)
    try:
        library = tokenizers.Tokenizer.from_file(str(source / TOKENIZER))
    except Exception as error:  # the library raises nothing more particular
        raise CheckpointError(
            f"{source / TOKENIZER} is no tokenizer ({' '.join(str(error).split())[:200]}): take"
            " another folder"
        ) from None
    largest = max(library.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= config.vocab_size:
        raise CheckpointError(
            f"{source / TOKENIZER} has ids up to {largest}, and the model a vocab_size of"
            f" {config.vocab_size}: copy its own there"
        )
    # If config.json leaves these ids out, the class has defaults that may be any word of the
    # vocabulary: only special tokens count.
    special = {
        number: token.content
        for number, token in library.get_added_tokens_decoder().items()
        if token.special
    }
    tokens = {
        "eod_token": _document_end(source, library, config),
        "bos_token": special.get(config.bos_token_id),
        "pad_token": special.get(config.pad_token_id),
    }
    section = {"kind": "file", "path": str(output / TOKENIZER)} | {
        field: token for field, token in tokens.items() if token is not None
    }
    # A model that was trained with a token before each text gets it in training too.
    begins = library.encode("a").ids[:1]
    return section | (
        {"prepend_bos": True} if "bos_token" in section and begins == [config.bos_token_id] else {}
    )


def _document_end(source: Path, library: tokenizers.Tokenizer, config: TokenIds) -> str | None:
    """The end-of-document token: the first that ``config.json`` names, if it is no ordinary word.

    Otherwise that of ``tokenizer_config.json``, if there is one.
    """
    ids = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    added = {number: token.content for number, token in library.get_added_tokens_decoder().items()}
    path = source / TOKENIZER_CONFIG
    named = read_json_object(path).get("eos_token") if path.is_file() else None
    named = named.get("content") if isinstance(named, dict) else named
    known = named if isinstance(named, str) and library.token_to_id(named) is not None else None
    return added.get(ids[0], known) if ids and isinstance(ids[0], int) else known
