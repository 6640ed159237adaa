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
from pretrain.model.config import ModelConfig
from tests.support.random_checkpoint import (
    VOCAB_SIZE,
    random_checkpoint,
    recipe_of,
    small_tokenizer,
)

Tensors = dict[str, torch.Tensor]
LLAMA3 = "model.position={kind: llama3, factor: 8, original_max_position_embeddings: 8192}"
YARN = (
    "model.position={kind: yarn, factor: 4, original_max_position_embeddings: 32, mscale: 0.7,"
    " mscale_all_dim: 1.3}"
)
# Megatron chooses groups by their top_k / top_k_groups best experts.
TWO_BEST = "model.moe.router.groups.top_k_groups=2"
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
    "deepseek_v3": ("deepseek_v3_mini", [TWO_BEST, YARN, "model.num_hidden_layers=4"]),
    "mla_without_query_latent": (
        "deepseek_v3_mini",
        [
            TWO_BEST,
            "model.attention.q_lora_rank=null",
            "model.position={kind: rope, rope_theta: 500}",
            "model.layer_pattern.k=0",
            "model.num_hidden_layers=2",
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
    # Everything that Megatron's own modules ask for is there; what they leave alone is for those
    # of Transformer Engine: their states, and norms by their names.
    assert found["lacking"] == [] and found["iteration"] == 0
    assert all("_extra_state" in key or "norm" in key for key in found["left_alone"])
    ids_BS = torch.load(folder / "ids.pt")
    expected_BSV = our_logits(folder / name / "ours", ids_BS)[..., :VOCAB_SIZE]
    assert expected_BSV.std() > 0.05
    torch.testing.assert_close(
        logits_of(folder / name, "logits"), expected_BSV, atol=1e-4, rtol=1e-4
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
    model = read_recipe(folder / name / "ours").model
    recipe = read_recipe(tmp_path / "back").model
    before = _as_dropless(load_state_dict(folder / name / "ours"), model, recipe)
    after = load_state_dict(tmp_path / "back")
    if model.embedding_size is not None:
        projection = before.pop("embedding.projection")
        before["embedding.weight"] = before["embedding.weight"] @ projection.T
    assert before.keys() == after.keys()
    for key, tensor in after.items():
        # Padding of the vocabulary is nobody's token.
        rows = VOCAB_SIZE if key in ("embedding.weight", "head.weight") else None
        assert torch.equal(tensor[:rows], before[key][:rows]), key
    assert recipe.moe_layers == model.moe_layers
    for section in ("attention", "position", "norm", "tie_word_embeddings", "hidden_size"):
        assert getattr(recipe, section) == getattr(model, section)
    if model.moe is not None and model.moe_layers:
        assert recipe.routing is not None and model.routing is not None
        assert recipe.routing.router == model.routing.router
        assert recipe.routing.top_k == model.routing.top_k


def _as_dropless(tensors: Tensors, model: ModelConfig, dropless: ModelConfig) -> Tensors:
    """Native experts by the names of dropless ones, which an import writes."""
    if model.routing is None or model.routing.kind == "dropless":
        return tensors
    assert dropless.routing is not None
    names = model.feed_forward.parameter_names
    stacks = dropless.routing.expert_tensors(names)
    for layer in model.moe_layers:
        inner = f"layers.{layer}.feed_forward."
        for parameter, (name,) in model.routing.expert_tensors(names).items():
            (stack,) = stacks[parameter]
            experts = range(model.routing.num_experts)
            tensors[inner + stack] = torch.stack(
                [tensors.pop(inner + name.format(expert=expert)) for expert in experts]
            )
    return {model.routing.common_name(name): tensor for name, tensor in tensors.items()}
