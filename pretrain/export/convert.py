"""From a checkpoint to a folder of another format: written, read back, compared, and only then published."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.token_stream import TokenStream
from data_pipeline.tokenizer import load_tokenizer
from pretrain.checkpoint.layout import RECIPE, TOKENIZER, read_recipe, read_state
from pretrain.checkpoint.weights import load_model, load_state_dict
from pretrain.export.hf_folder import write_hf_folder
from pretrain.export.parity import Parity, check_parity, check_same_tensors, compare_logits, load_exported, parity_windows
from pretrain.export.targets import choose_target
from pretrain.export.writer import RECORD, copy_file, dtype_name, published_folder, read_weights, total_bytes, write_json_file, write_weights


@dataclass(frozen=True)
class Conversion:
    """What was written: also the content of ``export.json`` beside it.

    Attributes:
        bytes: of the weights.
        left_out: tensors of multi-token prediction that the target has no place for; no next token depends on them.
    """

    target: str
    step: int
    dtype: str
    tensors: int
    bytes: int
    parity: Parity | None
    left_out: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def export_hf(checkpoint: Path, output: Path, heldout: TokenStream, dtype: torch.dtype, overwrite: bool) -> Conversion:
    """Writes a folder that transformers opens without code of ours, and compares its logits with the checkpoint's.

    Args:
        checkpoint: a ``step_N`` folder.
        heldout: tokens of the checkpoint's own tokenizer; full windows of them are compared.
        dtype: of the written weights. Below fp32, logits are compared with those of the equally rounded checkpoint, all computed in fp32.

    Raises:
        ConfigError: when no architecture computes what the model computes, or ``output`` is taken.
        CheckpointError: when the logits or the tensors differ; ``output`` is then left as it was.
    """
    recipe = read_recipe(checkpoint)
    target = choose_target(recipe)
    tokenizer = load_tokenizer(checkpoint / TOKENIZER, recipe.data.tokenizer)
    windows_WS = parity_windows(heldout, recipe.train.sequence_length)
    weights, named = _load_rounded(checkpoint, dtype), {link.ours for link in target.links(recipe.model)}
    left_out = tuple(name for name in weights if name.startswith("multi_token.") and name not in named)
    for name in left_out:
        del weights[name]
    with published_folder(output, overwrite) as folder:
        tensors, size = write_hf_folder(folder, target, recipe.model, weights, tokenizer)
        model, _ = load_model(checkpoint)
        round_parameters(model, dtype)
        parity = compare_logits(model, load_exported(folder), windows_WS)
        check_parity(parity)
        conversion = Conversion(target.architecture, read_state(checkpoint)["step"], dtype_name(dtype), tensors, size, parity, left_out)
        write_json_file(folder / RECORD, conversion.to_dict())
    return conversion


def export_safetensors(checkpoint: Path, output: Path, dtype: torch.dtype, overwrite: bool) -> Conversion:
    """Writes all weights, with the experts of all ranks joined and under our names, beside the recipe and the tokenizer.

    Raises:
        ConfigError: when ``output`` is taken.
        CheckpointError: when a tensor does not read back as it was written; ``output`` is then left as it was.
    """
    with published_folder(output, overwrite) as folder:
        tensors = {name: tensor.contiguous() for name, tensor in _load_rounded(checkpoint, dtype).items()}
        write_weights(folder, tensors)
        check_same_tensors(tensors, read_weights(folder))
        for name in (RECIPE, TOKENIZER):
            copy_file(checkpoint / name, folder / name)
        conversion = Conversion("safetensors", read_state(checkpoint)["step"], dtype_name(dtype), len(tensors), total_bytes(tensors), None)
        write_json_file(folder / RECORD, conversion.to_dict())
    return conversion


def _load_rounded(checkpoint: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) for name, tensor in load_state_dict(checkpoint).items()}


@torch.no_grad()
def round_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Rounds each fp32 parameter to what ``dtype`` can hold; the parameters stay fp32."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype).float())
