"""Models of every kind with random weights, exported as ``custom`` and tried out by another process
(custom_worker.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_pipeline.tokenizer.tokenizer import Tokenizer
from pretrain.config.load import load_recipe
from pretrain.config.recipe import Recipe
from pretrain.core.shipped import recipe_names
from pretrain.export.custom.target import Custom
from pretrain.export.hf_folder import write_hf_folder
from pretrain.model.decoder import DecoderLM
from tests.support.in_memory_tensors import InMemoryTensors
from tests.support.model_kinds import CASES as EVERY_KIND
from tests.support.paths import WORKERS

B, S, PADDING = 3, 24, (0, 5, 11)
WORKER = WORKERS / "custom_model.py"
LATENT = (
    "num_attention_heads: 4, kv_lora_rank: 12, qk_rope_head_dim: 4, qk_nope_head_dim: 8,"
    " v_head_dim: 6"
)
PRODUCTS = "product_key_sizes: [6, 5], num_heads: 2, top_k: 3, query_dim: 16"
SCALED = (
    "factor: 4, original_max_position_embeddings: 16, mscale: 0.7, mscale_all_dim: 1.2, truncate:"
    " false"
)
NATIVE = [
    "model.moe.kind=deepspeed",
    "model.moe.causal=false",
    "model.moe.use_residual=true",
    "model.moe.min_capacity=2",
]


def limited(gate: str, top_k: int, factor: float) -> list[str]:
    """DeepSpeed's layer with experts that fill up."""
    renormalised = f"model.moe.router.norm_topk_prob={str(top_k > 1).lower()}"
    return [
        *NATIVE,
        f"model.moe.gate={gate}",
        f"model.moe.top_k={top_k}",
        f"model.moe.eval_capacity_factor={factor}",
        renormalised,
    ]


# Overrides of the debug recipe; more than a kind at a time, and what drops tokens.
MORE: dict[str, list[str]] = {
    "latents with all options": [
        (
            f"model.attention={{kind: mla, {LATENT}, bias: all, sinks: true, sliding_window: 7,"
            " full_attention_every: 2}"
        ),
        f"model.position={{kind: yarn, {SCALED}}}",
    ],
    "alibi of six heads with sinks": [
        "model.attention.num_attention_heads=6",
        "model.attention.sinks=true",
        "model.position.kind=alibi",
    ],
    "yarn with a factor given": [
        "model.position={kind: yarn, factor: 4, original_max_position_embeddings: 16,"
        " attention_factor: 1.3}"
    ],
    "groups by their best expert": [
        "model.moe.num_experts=8",
        (
            "model.moe.router={kind: sigmoid_topk, bias: true, norm_topk_prob: false,"
            " routed_scaling_factor: 1.7}"
        ),
        "model.moe.router.groups={num_groups: 4, top_k_groups: 2, score: max}",
        "model.moe.bias_balancing={}",
        "model.moe.shared_intermediate_size=20",
        "model.moe.num_shared_experts=2",
    ],
    "product keys": [
        f"model.moe={{kind: peer, {PRODUCTS}}}",
        "model.moe.num_shared_experts=1",
        "model.moe.moe_intermediate_size=2",
    ],
    "product keys of three dimensions, batch norm": [
        (
            "model.moe={kind: peer, product_key_sizes: [3, 4, 5], num_heads: 2, top_k: 3,"
            " query_dim: 12, query_bias: true, query_norm: batch_norm}"
        ),
        "model.feed_forward.kind=gelu",
    ],
    "latents with a layer norm": [
        f"model.attention={{kind: mla, {LATENT}, q_lora_rank: 16, latent_norm: layer_norm}}"
    ],
    "drops of the first choice": limited("deepspeed", 1, 0.6),
    "drops of two choices": limited("deepspeed", 2, 0.6),
    "drops of three choices": limited("deepspeed", 3, 0.6),
    "drops of the last tokens": limited("router", 2, 0.6),
}
SMALL_RECIPES = [name for name in recipe_names() if name.endswith("_mini")]
CASES = [*EVERY_KIND, *MORE, *SMALL_RECIPES]


def recipe_of(case: str) -> Recipe:
    if case in SMALL_RECIPES:
        return load_recipe(case, ["model.vocab_size=500"])
    return load_recipe("debug", ["model.vocab_size=250", *(EVERY_KIND | MORE)[case]])


def random_model(recipe: Recipe) -> DecoderLM:
    """Every number random, biases, sinks and balancing biases too, and large enough for each to
    show.
    """
    model, generator = DecoderLM(recipe.model), torch.Generator().manual_seed(0)
    spread = 2.0 / recipe.model.hidden_size**0.5
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.normal_(
                1.0 if name.endswith("norm.weight") else 0.0,
                0.3 if tensor.dim() == 1 else spread,
                generator=generator,
            )
            if name.endswith("variance"):
                tensor.abs_().add_(0.5)
    return model.eval()


def weights_of(model: DecoderLM) -> dict[str, Tensor]:
    """As a checkpoint has them: without a tied head."""
    tied = {"head.weight"} if model.config.tie_word_embeddings else set()
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def prompts_of(recipe: Recipe) -> dict[str, Tensor]:
    """Ids [B, S], and the same with padding before them [B, S + PADDING]."""
    assert recipe.model.vocab_size is not None
    ids = torch.randint(
        1, recipe.model.vocab_size, (B, S), generator=torch.Generator().manual_seed(1)
    )
    padded, mask = torch.zeros(B, S, dtype=torch.int64), torch.zeros(B, S, dtype=torch.int64)
    for row, count in enumerate(PADDING):
        padded[row, count:], mask[row, count:] = ids[row, : S - count], 1
    return {"ids": ids, "padded_ids": padded, "padded_mask": mask}


@dataclass(frozen=True)
class Opened:
    """Our model, what it was asked, and what the export made of it in the other process."""

    model: DecoderLM
    prompts: dict[str, Tensor]
    computed: dict[str, Tensor]
    said: dict[str, Any]
    left_out: tuple[str, ...]


def open_elsewhere(folder: Path, cases: list[str], tokenizer: Tokenizer) -> dict[str, Opened]:
    """Exports each case and lets one process without this project try all of them.

    ``TRANSFORMERS_PYTHON=/path/to/another/python`` tries them in another version of transformers.
    """
    models, left_out = {case: random_model(recipe_of(case)) for case in cases}, {}
    folders = {case: folder / f"case_{number}" for number, case in enumerate(cases)}
    for case, model in models.items():
        folders[case].mkdir()
        left_out[case] = write_hf_folder(
            folders[case], Custom(), model.config, InMemoryTensors(weights_of(model)), tokenizer
        ).left_out
        save_file(prompts_of(recipe_of(case)), folders[case] / "prompts.safetensors")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [
        os.environ.get("TRANSFORMERS_PYTHON", sys.executable),
        str(WORKER),
        *map(str, folders.values()),
    ]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=800
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {
        case: Opened(
            model,
            load_file(folders[case] / "prompts.safetensors"),
            load_file(folders[case] / "computed.safetensors"),
            json.loads((folders[case] / "said.json").read_text()),
            left_out[case],
        )
        for case, model in models.items()
    }
