"""A Hugging Face ``config.json`` as a recipe: what transformers reads in it, and a refusal of what
no recipe can say.
"""

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
# Fields of config.json that change nothing of what the model computes, or that a recipe says in its
# own way.
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
    # One pattern of dense layers can be said in two ways; sparse_layers reads both and refuses what
    # recipes cannot say.
    "decoder_sparse_step",
    "mlp_only_layers",
}
# Fields that code shared by all classes reads where a class does not declare them, and what changes
# nothing.
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
    """A config's fields with transformers' defaults, under every name that transformers knows them
    by.

    ``fields[name]`` raises :class:`ConfigError` for a null, ``fields.get(name)`` gives it.
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
        return getattr(self.config, name, default)

    def __iter__(self) -> Iterator[str]:
        return iter(self.config.to_dict())

    def __len__(self) -> int:
        return len(self.config.to_dict())


def recipe_of(source: Path, output: Path, target: LlamaLike, config: PreTrainedConfig) -> Recipe:
    """A recipe whose model is that of ``config``; what it says of training is a beginning to be
    changed.

    Args:
        source: the folder of ``config``, for the recipe's name, the tokenizer and errors.
        output: where the tokenizer will be.

    Raises:
        ConfigError: naming a field of ``config`` that no recipe can say, or that transformers' own
            class cannot compute with.
    """
    path = source / "config.json"
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", source.resolve().name).lstrip("._-") or target.name
    _check_undeclared(path, config)
    content = {
        "name": name,
        "data": {"tokenizer": _tokenizer_section(source, output, config)},
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
    ours, theirs = (
        _resolved(each) for each in (type(config)(**target.config(recipe.model, 0)), config)
    )
    unread = NEUTRAL | target.unread(_Fields(config))
    for field, value in theirs.items():
        if (
            field not in unread
            and not field.startswith("_")
            and field in ours
            and ours[field] != value
        ):
            said, nearest = _difference(field, value, ours[field])
            raise ConfigError(
                f"{path} says {said}, and the nearest recipe would be {nearest}: it cannot be"
                " converted exactly"
            )
    _check_buildable(path, target, config)
    return recipe


def _model_section(path: Path, target: LlamaLike, config: PreTrainedConfig) -> JsonObject:
    try:
        return target.model_section(_Fields(config))
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:  # fields of the wrong type, or none
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path} is no config of {target.name} ({type(error).__name__}: {reason}): take another"
            " folder"
        ) from None


def _check_undeclared(path: Path, config: PreTrainedConfig) -> None:
    """A field that the class does not declare is passed over by most readers, but not by all of
    transformers' code.
    """
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
    """transformers' own class takes the config: without memory for its weights, and before ours are
    written.
    """
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


def _difference(field: str, value: Any, ours: Any) -> tuple[str, str]:
    """Two values that differ, in the words of ``config.json``; of dictionaries the first entry that
    does.
    """
    if isinstance(value, dict) and isinstance(ours, dict):
        for name in (*value, *ours):
            if value.get(name) != ours.get(name):
                return f"{field}.{name} = {value.get(name)}", str(ours.get(name))
    return f"{field} = {value}", str(ours)


def _tokenizer_section(source: Path, output: Path, config: PreTrainedConfig) -> JsonObject:
    if not (source / TOKENIZER).is_file():
        return {"kind": "train_bpe"}
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
    # Where config.json leaves these ids out, its class names some that may be any word of the
    # vocabulary.
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


def _document_end(
    source: Path, library: tokenizers.Tokenizer, config: PreTrainedConfig
) -> str | None:
    """The first end that ``config.json`` names if it is no word, else the one of
    ``tokenizer_config.json``, if there is one.
    """
    ids = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    added = {number: token.content for number, token in library.get_added_tokens_decoder().items()}
    path = source / TOKENIZER_CONFIG
    named = read_json_object(path).get("eos_token") if path.is_file() else None
    named = named.get("content") if isinstance(named, dict) else named
    known = named if isinstance(named, str) and library.token_to_id(named) is not None else None
    return added.get(ids[0], known) if ids and isinstance(ids[0], int) else known
