"""Exports to classes of transformers' own open in the last release before version 5 too,
unmodified, and compute the same.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pretrain.config.load import load_recipe
from pretrain.config.recipe import Recipe
from pretrain.export.hf_folder import write_hf_folder
from pretrain.export.targets import choose_target
from pretrain.model.decoder import DecoderLM
from tests.support.custom_exports import SMALL_RECIPES, prompts_of, random_model, weights_of
from tests.support.in_memory_tensors import InMemoryTensors
from tests.support.package_environment import environment_with
from tests.support.paths import WORKERS
from tests.support.random_checkpoint import small_tokenizer
from tests.support.workers.transformers_model import NEW_TOKENS
from tests.unit.export.test_architectures import VARIANTS

WORKER = WORKERS / "transformers_model.py"
VERSION = "4.57.6"
# What release 4.57.6 asks for and a newer transformers does not have; the rest, torch first of all,
# is the tests' own.
PACKAGES = (f"transformers=={VERSION}", "huggingface-hub==0.36.0", "tokenizers==0.22.1")

# Architectures that no shipped recipe is.
DENSE = [name for name in VARIANTS if name.startswith(("llama", "mistral", "qwen2: ", "qwen3: "))]

# An export multiplies a factorised embedding out, and the tensors here are given as they are.
PLAIN = ["model.embedding_size=null"]


def mini(name: str) -> Recipe:
    recipe, overrides = (
        (VARIANTS[name][0], [*VARIANTS[name][1], *PLAIN]) if name in DENSE else (name, [])
    )
    return load_recipe(recipe, ["model.vocab_size=500", *overrides])


NATIVE = [
    name
    for name in ["quickstart", *SMALL_RECIPES, *DENSE]
    if choose_target(mini(name)).name != "custom"
]


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which Python finds transformers 4.57.6."""
    return environment_with(PACKAGES, tmp_path_factory.mktemp("site"), "--no-deps")


def exported(folder: Path, name: str, model: DecoderLM) -> Path:
    recipe = mini(name)
    folder.mkdir()
    write_hf_folder(
        folder,
        choose_target(recipe),
        recipe.model,
        InMemoryTensors(weights_of(model)),
        small_tokenizer(),
    )
    save_file(prompts_of(recipe), folder / "prompts.safetensors")
    return folder


def greedy(model: DecoderLM, ids_BS: torch.Tensor) -> torch.Tensor:
    texts_BS = ids_BS
    for _ in range(NEW_TOKENS):
        logits_BV = model.logits(texts_BS)[:, -1].index_fill(
            1, torch.tensor([0]), -torch.inf
        )  # no end before the last token
        texts_BS = torch.cat((texts_BS, logits_BV.argmax(dim=-1, keepdim=True)), dim=1)
    return texts_BS[:, ids_BS.shape[1] :]


@pytest.mark.full
def test_native_exports_compute_the_same_in_transformers_4(
    older: dict[str, str], tmp_path: Path
) -> None:
    models = {name: random_model(mini(name)) for name in NATIVE}
    folders = {name: exported(tmp_path / name, name, model) for name, model in models.items()}
    done = subprocess.run(
        [sys.executable, str(WORKER), "4.57", *map(str, folders.values())],
        cwd=tmp_path,
        env=older,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for name, model in models.items():
        computed, ids_BS = (
            load_file(folders[name] / "computed.safetensors"),
            prompts_of(mini(name))["ids"],
        )
        with torch.inference_mode():
            ours = model.logits(ids_BS)
            assert ours.std() > 0.3, name
            assert torch.equal(computed["greedy"], greedy(model, ids_BS)), name
        torch.testing.assert_close(
            computed["logits"][..., : ours.shape[-1]],
            ours,
            atol=1e-4,
            rtol=0,
            msg=lambda text, name=name: f"{name}: {text}",
        )
