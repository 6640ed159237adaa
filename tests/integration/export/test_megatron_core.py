"""Megatron-Core's own GPTModel computes what was written, and its checkpoints become ours."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.checkpoint.layout import read_recipe
from pretrain.checkpoint.weights import load_model, load_state_dict
from pretrain.export.megatron.convert import export_megatron, import_megatron
from pretrain.export.megatron.torch_dist import ITERATION
from tests.support.random_checkpoint import (
    VOCAB_SIZE,
    random_checkpoint,
    recipe_of,
    small_tokenizer,
)

LLAMA3 = "model.position={kind: llama3, factor: 8, original_max_position_embeddings: 8192}"
# name: the recipe, and what is changed of it.
CASES: dict[str, tuple[str, list[str]]] = {
    "llama": (
        "debug",
        [
            "model.layer_pattern.kind=all_dense",
            "model.intermediate_size=48",
            "model.attention.qk_norm=none",
            "model.attention.bias=qkv",
            "model.tie_word_embeddings=true",
            "model.embedding_size=24",
            LLAMA3,
        ],
    ),
    "mixtral": ("mixtral_8x7b_mini", []),
    "qwen3_moe": ("qwen3_30b_a3b_mini", []),
    "every_second": (
        "debug",
        [
            "model.moe.kind=deepspeed",
            "model.moe.drop_tokens=false",
            "model.moe.gate=router",
            "model.num_hidden_layers=4",
            "model.layer_pattern={kind: every_nth, n: 2}",
            "model.intermediate_size=48",
            "model.moe.router={norm_topk_prob: false, routed_scaling_factor: 1.5}",
        ],
    ),
    "deepseek_v3": ("deepseek_v3_mini", []),
    "mla_without_query_latent": (
        "deepseek_v3_mini",
        [
            "model.attention.q_lora_rank=null",
            "model.position={kind: rope, rope_theta: 500}",
            "model.layer_pattern.kind=all_moe",
        ],
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case exported, loaded by Megatron-Core, and saved by it with random weights."""
    folder = tmp_path_factory.mktemp("megatron")
    tokenizer = small_tokenizer()
    cases = []
    for name, (recipe, overrides) in CASES.items():
        random_checkpoint(folder / name / "ours", recipe_of(recipe, *overrides), tokenizer)
        export_megatron(folder / name / "ours", folder / name / "out", torch.float32, False)
        cases.append(
            {
                "name": name,
                "folder": str(folder / name / "out" / ITERATION.format(0)),
                "logits": str(folder / name / "logits.pt"),
                "random": str(folder / name / "random"),
                "random_logits": str(folder / name / "random_logits.pt"),
            }
        )
    generator = torch.Generator().manual_seed(0)
    torch.save(torch.randint(VOCAB_SIZE, (2, 48), generator=generator), folder / "ids.pt")
    (folder / "cases.json").write_text(json.dumps(cases))
    program = [sys.executable, "-m", "tests.support.megatron_core", str(folder / "cases.json")]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def our_logits(checkpoint: Path, ids_BS: torch.Tensor) -> torch.Tensor:
    model, _ = load_model(checkpoint)
    with torch.inference_mode():
        return model.logits(ids_BS)


def logits_of(folder: Path, name: str) -> torch.Tensor:
    logits_BSV: torch.Tensor = torch.load(folder / f"{name}.pt")
    return logits_BSV[..., :VOCAB_SIZE]


@pytest.mark.parametrize("name", CASES)
def test_megatrons_model_has_the_logits_of_what_was_written(folder: Path, name: str) -> None:
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())[name]
    # Nothing that Megatron's modules ask for is missing; what they leave alone are states of
    # Transformer Engine's modules, and norms by its name or by that of Megatron's own modules.
    assert found["missing"] == [] and found["iteration"] == 0
    assert all("_extra_state" in key or "norm" in key for key in found["unexpected"])
    ids_BS = torch.load(folder / "ids.pt")
    expected_BSV = our_logits(folder / name / "ours", ids_BS)[..., :VOCAB_SIZE]
    assert expected_BSV.std() > 0.05
    torch.testing.assert_close(
        logits_of(folder / name, "logits"), expected_BSV, atol=2e-5, rtol=1e-4
    )
    # The counterpart that must fail: another model's logits.
    assert (logits_of(folder / name, "random_logits") - expected_BSV).abs().max() > 0.1


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_that_megatron_saved_has_its_logits_here(
    folder: Path, name: str, tmp_path: Path
) -> None:
    conversion = import_megatron(folder / name / "random", tmp_path / "ours", False)
    assert conversion.step == 42
    ids_BS = torch.load(folder / "ids.pt")
    found_BSV = our_logits(tmp_path / "ours", ids_BS)[..., :VOCAB_SIZE]
    torch.testing.assert_close(
        found_BSV, logits_of(folder / name, "random_logits"), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("name", CASES)
def test_there_and_back_is_the_same_checkpoint_bit_for_bit(
    folder: Path, name: str, tmp_path: Path
) -> None:
    import_megatron(folder / name / "out", tmp_path / "back", False)
    before = load_state_dict(folder / name / "ours")
    after = load_state_dict(tmp_path / "back")
    model = read_recipe(folder / name / "ours").model
    if model.embedding_size is not None:
        projection = before.pop("embedding.projection")
        before["embedding.weight"] = before["embedding.weight"] @ projection.T
    assert before.keys() == after.keys() if model.moe is None else True
    for key, tensor in after.items():
        rows = VOCAB_SIZE if key in ("embedding.weight", "head.weight") else None
        assert torch.equal(tensor[:rows], _ours(before, key)[:rows]), key
    ignored = {"vocab_size", "embedding_size", "moe", "vocab_multiple"}
    recipe = read_recipe(tmp_path / "back").model
    assert recipe.model_dump(exclude=ignored) == model.model_dump(exclude=ignored)


def _ours(tensors: dict[str, torch.Tensor], key: str) -> torch.Tensor:
    """A tensor by the name that a dropless model has for it."""
    return tensors[key]
