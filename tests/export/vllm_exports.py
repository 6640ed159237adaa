"""Exports to classes of transformers' own are served by vLLM on a CPU, and it computes what our model computes.

vLLM asks for packages that our own environment must not have, so it lives in another one, and these tests run only when this file is named:
``VLLM_PYTHON=/path/to/its/python pytest tests/export/vllm_exports.py``.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pretrain.config.load import load_recipe
from pretrain.config.schema import Recipe
from pretrain.export.hf_folder import write_hf_folder
from pretrain.export.targets import choose_target
from pretrain.model.decoder import DecoderLM
from tests.export.custom_exports import prompts_of, random_model, weights_of
from tests.export.held_tensors import Held
from tests.export.random_checkpoint import small_tokenizer

WORKER = Path(__file__).with_name("vllm_worker.py")
# One process, no threads bound to cores that a container may not have, a small cache, nothing sent or fetched.
VARIABLES = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
WIDE_HEADS = ["model.attention.head_dim=32"]  # the narrowest that vLLM's attention has on a CPU
RECIPES: dict[str, list[str]] = {
    "quickstart": [],
    "mixtral_8x7b_mini": WIDE_HEADS,
    "qwen3_30b_a3b_mini": WIDE_HEADS,
    "olmoe_1b_7b_mini": WIDE_HEADS,
    "deepseek_moe_16b_mini": WIDE_HEADS,
}


def recipe_of(name: str) -> Recipe:
    return load_recipe(name, ["model.vocab_size=500", *RECIPES[name]])


def served(folder: Path, recipe: Recipe, model: DecoderLM) -> dict[str, torch.Tensor]:
    """What vLLM answers. The prompts lie outside the export: vLLM takes each file of tensors in it for weights."""
    export, prompts, answers = folder / "hf", folder / "prompts.safetensors", folder / "answers.safetensors"
    export.mkdir()
    write_hf_folder(export, choose_target(recipe), recipe.model, Held(weights_of(model)), small_tokenizer())
    save_file({"ids": prompts_of(recipe)["ids"]}, prompts)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | VARIABLES
    command = [os.environ["VLLM_PYTHON"], str(WORKER), str(export), str(prompts), str(answers)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return load_file(answers)


@pytest.mark.parametrize("name", RECIPES)
def test_vllm_computes_what_our_model_computes(name: str, tmp_path: Path) -> None:
    recipe = recipe_of(name)
    model, ids_BS = random_model(recipe), prompts_of(recipe)["ids"]
    answers = served(tmp_path, recipe, model)
    whole_BT = torch.cat((ids_BS, answers["greedy"]), dim=1)
    with torch.inference_mode():
        logits_BTV = model.logits(whole_BT[:, :-1])
    assert logits_BTV.std() > 0.3
    start = ids_BS.shape[1] - 1
    assert torch.equal(logits_BTV[:, start:].argmax(dim=-1), answers["greedy"])
    ours_BT = logits_BTV.float().log_softmax(dim=-1).gather(2, whole_BT[:, 1:, None])[..., 0]
    theirs_BT = torch.cat((answers["prompt logprobs"], answers["greedy logprobs"]), dim=1)
    torch.testing.assert_close(theirs_BT, ours_BT, atol=1e-4, rtol=0)
    print(f"{name}: largest difference of a log-probability {(theirs_BT - ours_BT).abs().max():.1e}")
