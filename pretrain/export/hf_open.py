"""Opens Hugging Face folders, for the whole project: no code of a folder is run.

What is missing in a folder is named. This project's model class is registered with transformers, so
that ``trust_remote_code`` is never needed.
"""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import safe_open
from torch import Tensor

from pretrain.core.errors import CheckpointError
from pretrain.core.files import JsonObject
from pretrain.export.hf_files import (
    CONFIG,
    check_tokenizer_files,
    checked_view,
    read_config,
    stored_shapes,
    unset_fields,
    weight_files,
)
from pretrain.export.writer import read_json_object

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Shapes = Mapping[str, tuple[int, ...]]
LOCAL: JsonObject = {"local_files_only": True, "trust_remote_code": False}
FOREIGN_LOGGERS = (
    "transformers",
    "huggingface_hub",
    "datasets",
    "lm_eval",
    "lm-eval",
    "httpx",
    "torchao",
    "torch",
    "accelerate",
    "filelock",
)
# Buffers in files of older releases, which every model computes itself.
COMPUTED = re.compile(r"rotary_emb\.inv_freq$")
SHOWN = 3


def quiet_libraries() -> None:
    """Silences warnings, notes and progress bars of other libraries."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    for name in FOREIGN_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def open_config(folder: Path) -> PreTrainedConfig:
    """The config with transformers' defaults.

    Raises:
        CheckpointError: if the folder holds foreign code, or transformers does not take its
            config.
    """
    content = read_config(folder)
    with checked_view(folder, content, weights=False) as view:
        return _config(folder, view)


def open_model(folder: Path, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """The model on the CPU in evaluation mode, with every weight from the folder.

    Args:
        dtype: of the weights; "auto" is the folder's own.

    Raises:
        CheckpointError: if the folder holds foreign code or pickles, or a tensor is missing,
            superfluous, of another shape or not finite.
    """
    content = read_config(folder)
    if content.get("quantization_config"):
        raise CheckpointError(
            f"the weights in {folder} are quantised: convert them to bf16 or fp32 first, with the"
            " tool that quantised them"
        )
    shapes = stored_shapes(folder)
    with checked_view(folder, content, weights=True) as view:
        config = _config(folder, view)
        _check_shapes(folder, _outline(folder, config), shapes)
        model = _load(folder, view, config, dtype)
    _check_finite(folder, model)
    return model.eval()


def check_stored(folder: Path) -> None:
    """Checks that every tensor is stored in its shape, without loading one; more may be there.

    Raises:
        CheckpointError: as :func:`open_model`, when a tensor is missing or has another shape.
    """
    content = read_config(folder)
    shapes = stored_shapes(folder)
    with checked_view(folder, content, weights=False) as view:
        outline = _outline(folder, _config(folder, view))
    expected, found = _without_copies(folder, outline, shapes)
    if wrong := _missing(expected, found) + _reshaped(expected, found):
        raise _incomplete(folder, wrong)


def open_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer.

    Raises:
        CheckpointError: if there is none, transformers cannot open it, or it has no
            end-of-document token.
    """
    quiet_libraries()
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    content = read_config(folder)
    check_tokenizer_files(folder)
    with checked_view(folder, content, weights=False) as view:
        config = _config(folder, view)
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(view, config=config, **LOCAL)
        except Exception as error:  # as in _config
            raise _refusal(folder, "the tokenizer in ", view, error) from None
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise CheckpointError(
            f"the tokenizer_class of {folder} is {type(tokenizer).__name__}, which is no tokenizer:"
            " correct it"
        )
    if tokenizer.eos_token_id is None:
        raise CheckpointError(
            f"the tokenizer in {folder} has no end-of-document token (eos_token): add it to"
            " tokenizer_config.json"
        )
    return tokenizer


def check_fit(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Checks that a model and a tokenizer belong together.

    Raises:
        CheckpointError: if an id has no row in the embedding, or the config has no longest text.
    """
    rows = cast(Tensor, model.get_input_embeddings().weight).shape[0]
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= rows:
        raise CheckpointError(
            f"the tokenizer in {folder} has ids up to {largest}, and the model embeddings for"
            f" {rows}: copy the model's own there"
        )
    if not isinstance(getattr(model.config, "max_position_embeddings", None), int):
        raise CheckpointError(
            f"{folder / 'config.json'} has no max_position_embeddings, the longest text in tokens:"
            " add it"
        )


def _config(folder: Path, view: Path) -> PreTrainedConfig:
    quiet_libraries()
    from transformers import AutoConfig, AutoModelForCausalLM

    from pretrain.export.custom.configuration_moe_pretrain import MoePretrainConfig
    from pretrain.export.custom.modeling_moe_pretrain import MoePretrainForCausalLM

    AutoConfig.register(MoePretrainConfig.model_type, MoePretrainConfig, exist_ok=True)
    AutoModelForCausalLM.register(MoePretrainConfig, MoePretrainForCausalLM, exist_ok=True)
    try:
        return cast("PreTrainedConfig", AutoConfig.from_pretrained(view, **LOCAL))
    # A field of a wrong type makes the class's constructor raise errors of any kind.
    except Exception as error:
        raise _refusal(
            folder,
            "the config.json of ",
            view,
            error,
            unset_fields(read_json_object(view / CONFIG)),
        ) from None


def _refusal(
    folder: Path, what: str, view: Path, error: Exception, note: str = ""
) -> CheckpointError:
    reason = (
        " ".join(str(error).replace(str(view), str(folder)).split())[:300] or type(error).__name__
    )
    return CheckpointError(
        f"transformers cannot open {what}{folder} ({type(error).__name__}: {reason}{note}):"
        " download or export it again"
    )


@dataclass(frozen=True)
class Outline:
    """What a model's class expects in files.

    Attributes:
        shapes: of each tensor, by the name that transformers itself would write.
        aliases: names of one and the same tensor, such as a tied head's and the embedding's.
        ignored: patterns of names that the class leaves out.
    """

    shapes: Shapes
    aliases: list[list[str]]
    ignored: list[re.Pattern[str]]

    def leaves_out(self, name: str) -> bool:
        """Whether the class ignores a tensor of this name in a file."""
        return name not in self.shapes and any(pattern.search(name) for pattern in self.ignored)


def _outline(folder: Path, config: PreTrainedConfig) -> Outline:
    """The model of ``config`` without memory for its weights."""
    from transformers import AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        state: dict[str, Tensor] = model.state_dict(keep_vars=True)
        forms = revert_weight_conversion(
            model, {name: tensor.detach() for name, tensor in state.items()}
        )
    except Exception as error:  # as in _config
        raise _refusal(folder, "the model of ", folder, error) from None
    groups: dict[int, list[str]] = {}
    for name, tensor in state.items():
        groups.setdefault(id(tensor), []).append(name)
    ignored = [
        COMPUTED,
        *(re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()),
    ]
    shapes = {name: tuple(tensor.shape) for name, tensor in forms.items()}
    return Outline(shapes, [names for names in groups.values() if len(names) > 1], ignored)


def _check_shapes(folder: Path, outline: Outline, stored: Shapes) -> None:
    """Raises :class:`CheckpointError` unless the files hold as many numbers as the model has.

    Names may be others than those of the outline (files of other releases): then transformers' own
    report decides.
    """
    expected, found = _without_copies(folder, outline, stored)
    if expected != found and sum(map(prod, expected.values())) != sum(map(prod, found.values())):
        superfluous = [f"'{name}' has no place in it" for name in found if name not in expected]
        raise _incomplete(
            folder, _missing(expected, found) + _reshaped(expected, found) + superfluous
        )


def _without_copies(folder: Path, outline: Outline, stored: Shapes) -> tuple[Shapes, Shapes]:
    """The expected and the stored shapes, with one name for each tensor, without ignored tensors.

    Raises:
        CheckpointError: if copies of one tensor differ.
    """
    expected = dict(outline.shapes)
    found = {name: shape for name, shape in stored.items() if not outline.leaves_out(name)}
    for aliases in outline.aliases:
        held = [name for name in aliases if name in found]
        _check_equal(folder, held)
        for name in aliases:
            if name != (held or aliases)[0]:
                expected.pop(name, None)
                found.pop(name, None)
    return expected, found


def _check_equal(folder: Path, names: list[str]) -> None:
    """Raises :class:`CheckpointError` when tensors differ that the model keeps as one."""
    tensors = [_read(folder, name) for name in names]
    if any(not torch.equal(tensor, tensors[0]) for tensor in tensors[1:]):
        raise CheckpointError(
            f"{folder} has '{names[0]}' and '{names[-1]}' that differ, and its config.json makes"
            " them one tensor (tie_word_embeddings): correct it"
        )


def _read(folder: Path, name: str) -> Tensor:
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118 (not a dict)
                return cast(Tensor, file.get_tensor(name))
    raise CheckpointError(f"{folder} has no tensor '{name}' any more: it changed while it was read")


def _missing(expected: Shapes, found: Shapes) -> list[str]:
    return [f"'{name}' is missing" for name in expected if name not in found]


def _reshaped(expected: Shapes, found: Shapes) -> list[str]:
    return [
        f"'{name}' is {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]


def _incomplete(folder: Path, clauses: Iterable[str]) -> CheckpointError:
    clauses = list(clauses)
    more = f" and {len(clauses) - SHOWN} more" if len(clauses) > SHOWN else ""
    return CheckpointError(
        f"{folder} does not hold the model of its config.json: {', '.join(clauses[:SHOWN])}{more}:"
        " download or export it again"
    )


def _load(
    folder: Path, view: Path, config: PreTrainedConfig, dtype: torch.dtype | str
) -> PreTrainedModel:
    """The model that transformers loads; it must have used every tensor, and missed none."""
    from transformers import AutoModelForCausalLM

    options = {
        **LOCAL,
        "use_safetensors": True,
        "output_loading_info": True,
        # Otherwise transformers raises for the first mismatch; the report lists all of them.
        "ignore_mismatched_sizes": True,
    }
    try:
        # transformers' annotations leave out that output_loading_info makes it a pair.
        opened: Any = AutoModelForCausalLM.from_pretrained(
            view, config=config, dtype=dtype, **options
        )
    except Exception as error:  # a damaged or hostile file raises errors of many kinds
        raise _refusal(folder, "the weights in ", view, error) from None
    model, report = cast("tuple[PreTrainedModel, JsonObject]", opened)
    clauses = [f"'{name}' is missing" for name in sorted(report["missing_keys"])]
    clauses += [
        f"'{name}' is {list(found)} instead of {list(wanted)}"
        for name, found, wanted in sorted(report["mismatched_keys"])
    ]
    clauses += [f"'{name}' has no place in it" for name in sorted(report["unexpected_keys"])]
    clauses += list(map(str, report.get("error_msgs") or ()))
    if clauses:
        raise _incomplete(folder, clauses)
    return model


def _check_finite(folder: Path, model: PreTrainedModel) -> None:
    """Raises :class:`CheckpointError` for a weight with NaN or infinity."""
    for name, tensor in model.state_dict().items():
        # aminmax propagates NaN, and unlike isfinite(tensor) needs no mask of the tensor's size.
        if (
            tensor.is_floating_point()
            and tensor.numel()
            and not all(torch.isfinite(end) for end in tensor.aminmax())
        ):
            raise CheckpointError(
                f"the tensor '{name}' in {folder} has numbers that are not finite: take another"
                " folder"
            )
