"""Exports to classes of transformers' own are served by vLLM on a CPU, and it computes what our
model computes.

vLLM asks for packages that our own environment must not have, so it lives in another one, and these
tests run only when this file is named: ``VLLM_PYTHON=/path/to/its/python pytest
tests/matrix/vllm_exports.py``.
"""

from __future__ import annotations

import copy
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pretrain.config.load import load_recipe
from pretrain.config.recipe import Recipe
from pretrain.export.hf_folder import write_hf_folder
from pretrain.export.targets import choose_target
from pretrain.model.decoder import DecoderLM
from tests.support.custom_exports import S, prompts_of, random_model, weights_of
from tests.support.in_memory_tensors import InMemoryTensors
from tests.support.paths import WORKERS
from tests.support.random_checkpoint import small_tokenizer

WORKER = WORKERS / "vllm_model.py"
# One process, no threads bound to cores that a container may not have, a small cache, nothing sent
# or fetched.
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
    "gpt_oss_20b_mini": WIDE_HEADS,
}


def recipe_of(name: str) -> Recipe:
    return load_recipe(name, ["model.vocab_size=500", *RECIPES[name]])


def served(folder: Path, recipe: Recipe, model: DecoderLM) -> dict[str, torch.Tensor]:
    """What vLLM returns.

    The prompts are outside the export: vLLM takes each file of tensors in it for weights.
    """
    export, prompts, answers = (
        folder / "hf",
        folder / "prompts.safetensors",
        folder / "answers.safetensors",
    )
    export.mkdir()
    write_hf_folder(
        export,
        choose_target(recipe),
        recipe.model,
        InMemoryTensors(weights_of(model)),
        small_tokenizer(),
    )
    save_file({"ids": prompts_of(recipe)["ids"]}, prompts)
    environment = {
        name: value for name, value in os.environ.items() if name != "PYTHONPATH"
    } | VARIABLES
    command = [os.environ["VLLM_PYTHON"], str(WORKER), str(export), str(prompts), str(answers)]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return load_file(answers)


def logits_of(model: DecoderLM, texts_BT: torch.Tensor) -> torch.Tensor:
    """What follows each token but the last [B, T - 1, V]."""
    with torch.inference_mode():
        return model.logits(texts_BT[:, :-1]).float()


def logprobs_of(model: DecoderLM, texts_BT: torch.Tensor) -> torch.Tensor:
    return logits_of(model, texts_BT).log_softmax(dim=-1).gather(2, texts_BT[:, 1:, None])[..., 0]


@dataclass(frozen=True)
class Answered:
    """Our model, the prompts with vLLM's greedy texts [B, T], and the log-probability vLLM gives
    each token but the first [B, T - 1].
    """

    model: DecoderLM
    texts_BT: torch.Tensor
    logprobs_BT: torch.Tensor


@pytest.fixture(scope="module", params=RECIPES)
def answered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Answered:
    recipe = recipe_of(request.param)
    model = random_model(recipe)
    answers = served(tmp_path_factory.mktemp("vllm"), recipe, model)
    texts_BT = torch.cat((prompts_of(recipe)["ids"], answers["greedy"]), dim=1)
    return Answered(
        model, texts_BT, torch.cat((answers["prompt logprobs"], answers["greedy logprobs"]), dim=1)
    )


def test_logprobs_equal_ours(answered: Answered) -> None:
    torch.testing.assert_close(
        answered.logprobs_BT, logprobs_of(answered.model, answered.texts_BT), atol=1e-4, rtol=0
    )


def test_greedy_texts_equal_ours(answered: Answered) -> None:
    logits_BTV, new = logits_of(answered.model, answered.texts_BT), answered.texts_BT[:, S:]
    assert logits_BTV.std() > 0.3
    assert torch.equal(logits_BTV[:, S - 1 :].argmax(dim=-1), new)


def test_another_expert_weight_would_show(answered: Answered) -> None:
    spoiled = copy.deepcopy(answered.model)
    name, weight = [
        (name, weight)
        for name, weight in spoiled.named_parameters()
        if ".experts." in name and weight.dim() == 3
    ][-1]
    with torch.no_grad():
        weight[0].mul_(1.05)
    assert (logprobs_of(spoiled, answered.texts_BT) - answered.logprobs_BT).abs().max() > 1e-3, name
