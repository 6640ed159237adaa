"""Opens exported folders where nothing of this project is at hand, and writes down what the models
there compute.

Run as a program: ``python custom_worker.py FOLDER...``. A folder has ``prompts.safetensors``; it
gets ``computed.safetensors`` and ``said.json``.
"""

from __future__ import annotations

import json
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

NEW_TOKENS = 6
PROJECT = ("pretrain", "data_pipeline", "tests", "tools")


class Absent(MetaPathFinder):
    """Nothing of the project can be imported, even where an editable installation would find it
    from every folder.
    """

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        if fullname.split(".")[0] in PROJECT:
            raise ModuleNotFoundError(f"{fullname} is not to be had here", name=fullname)


def open_model(folder: Path, **options: Any) -> tuple[Any, dict[str, list[str]]]:
    """The model in evaluation mode, and what was wrong with its tensors."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **options
    )
    return model.eval(), {kind: sorted(map(str, names)) for kind, names in report.items() if names}


def generated(
    model: Any, ids_BS: torch.Tensor, mask_BS: torch.Tensor, **options: Any
) -> torch.Tensor:
    """The new tokens alone; a text continues after its end, so that all have the same length."""
    torch.manual_seed(0)
    length = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "pad_token_id": 0}
    return model.generate(ids_BS, attention_mask=mask_BS, **length, **options)[
        :, ids_BS.shape[1] :
    ].contiguous()


def cached_logits(model: Any, ids_BS: torch.Tensor) -> torch.Tensor:
    """A prompt, then a few tokens, then one by one."""
    cache, parts = transformers.DynamicCache(), []
    for part in ids_BS.split((7, 4, *[1] * (ids_BS.shape[1] - 11)), dim=1):
        parts.append(model(part, past_key_values=cache, use_cache=True).logits)
    return torch.cat(parts, dim=1)


def try_out(folder: Path) -> None:
    prompts = load_file(folder / "prompts.safetensors")
    ids_BS, padded_BS, mask_BS = prompts["ids"], prompts["padded_ids"], prompts["padded_mask"]
    model, faults = open_model(folder)
    said: dict[str, Any] = {
        "transformers": transformers.__version__,
        "faults": faults,
        "class": type(model).__module__,
    }
    computed = {"logits": model(ids_BS, use_cache=False).logits}
    computed["loss"] = model(ids_BS, labels=ids_BS).loss
    computed["cached logits"] = cached_logits(model, ids_BS)
    try:
        model(ids_BS, cache_of_another_name=transformers.DynamicCache())
    except TypeError as error:
        said["unknown cache"] = str(error)
    whole = torch.ones_like(ids_BS)
    for name, options in {
        "greedy": {"do_sample": False},
        "sampled": {"do_sample": True},
        "beams": {"do_sample": False, "num_beams": 3},
    }.items():
        computed[name] = generated(model, ids_BS, whole, **options)
        computed[f"{name} without cache"] = generated(
            model, ids_BS, whole, use_cache=False, **options
        )
    try:
        computed["padded logits"] = model(padded_BS, attention_mask=mask_BS).logits
        computed["padded greedy"] = generated(model, padded_BS, mask_BS, do_sample=False)
    except ValueError as error:
        said["padding refused"] = str(error)
    model.save_pretrained(folder / "again")
    again, said["faults again"] = open_model(folder / "again")
    computed["logits again"] = again(ids_BS, use_cache=False).logits
    low, _ = open_model(folder, dtype=torch.bfloat16)
    computed["bf16 logits"] = low(ids_BS).logits
    said["bf16 dtypes"] = sorted(
        {f"{name.split('.')[-1]} {tensor.dtype}" for name, tensor in low.state_dict().items()}
    )
    save_file(
        {name: tensor.contiguous() for name, tensor in computed.items()},
        folder / "computed.safetensors",
    )
    (folder / "said.json").write_text(json.dumps(said))


if __name__ == "__main__":
    sys.meta_path.insert(0, Absent())
    transformers.utils.logging.disable_progress_bar()
    with torch.inference_mode():
        for path in sys.argv[1:]:
            try_out(Path(path))
    assert not [name for name in sys.modules if name.split(".")[0] in PROJECT]
