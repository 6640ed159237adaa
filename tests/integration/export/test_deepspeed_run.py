"""A checkpoint of DeepSpeed's becomes one of ours with every moment, and training continues."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.shards.datasets import data_folders, load_datasets
from pretrain.checkpoint.layout import damage, read_state
from pretrain.checkpoint.state_hashes import state_hashes
from pretrain.config.load import load_recipe
from pretrain.core.errors import DONE, CheckpointError, ConfigError
from pretrain.engine.topology import connect
from pretrain.export.deepspeed_run import import_deepspeed_run
from pretrain.run.resolve import resolve_recipe
from pretrain.train import main
from tests.support.paths import TOOLS
from tests.support.ranks import run_cases
from tests.support.tiny_run import Tiny, curve, make_tiny, own_process
from tests.support.workers.deepspeed_source import SAVED_AT

TOOL = TOOLS / "convert_checkpoint.py"
COMMON = [
    "train.grad_clip=0.3", "model.initializer_range=0.15", "train.train_tokens=1536",
    "optimizer={kind: adamw, learning_rate: 3.0e-3, weight_decay: 0.1}",
]  # fmt: skip
KINDS = {
    "dropless": ["model.moe.bias_balancing={update_rate: 0.02}", "model.moe.num_shared_experts=1"],
    "native": ["model.moe.kind=deepspeed", "model.moe.drop_tokens=false"],
    "dense": ["model.layer_pattern.kind=all_dense", "model.intermediate_size=48"],
}
# Kind, ZeRO stage, ep_size of what is saved by two ranks.
QUICK = [("dropless", 2, 2), ("native", 0, 2)]
MORE = [
    *((kind, zero, ep_size) for kind in ("dropless", "native") for zero in (0, 1, 2)
      for ep_size in (1, 2) if (kind, zero, ep_size) not in QUICK),
    ("dense", 0, 1), ("dense", 1, 1),
]  # fmt: skip


def overrides(tiny: Tiny, kind: str, ep_size: int) -> list[str]:
    vocab_size = load_datasets({"": str(tiny.data)}).tokenizer.vocab_size
    expert_parallel = [] if kind == "dense" else [f"parallel.ep_size={ep_size}"]
    return [*COMMON, *KINDS[kind], *expert_parallel, f"model.vocab_size={vocab_size}"]


def imported(tiny: Tiny, settings: list[str], source: Path, output: Path) -> Path:
    recipe = load_recipe(str(tiny.recipe), settings)
    datasets = load_datasets(data_folders(recipe.data, recipe.data_path))
    recipe = resolve_recipe(recipe, recipe.train.precision, datasets)
    import_deepspeed_run(source, recipe, datasets, output, overwrite=False)
    return output


def check_routes(routes: list[tuple[str, int, int]], folder: Path) -> None:
    tiny = make_tiny(folder)
    saved: list[dict[str, Any]] = [
        {
            "name": f"{kind}_{zero}_{ep_size}",
            "recipe": str(tiny.recipe),
            "overrides": overrides(tiny, kind, ep_size),
            "zero": zero,
            "tokenizer": str(tiny.data / "tokenizer.json"),
            "saves": str(folder / f"{kind}_{zero}_{ep_size}"),
        }
        for kind, zero, ep_size in routes
    ]
    expected = run_cases("deepspeed_source", saved, 2, folder / "two")
    continued = []
    for case, (kind, zero, _) in zip(saved, routes, strict=True):
        runs = Path(case["saves"])
        checkpoint = imported(tiny, case["overrides"], runs / "deepspeed", runs / "imported")
        assert damage(checkpoint) is None
        ours = state_hashes(runs / "ours" / f"step_{SAVED_AT}")
        assert any(name.endswith("/exp_avg_sq") for name in ours)
        assert state_hashes(checkpoint) == ours, case["name"]
        state = read_state(checkpoint)
        assert (state["step"], state["zero_stage"], state["world_size"]) == (SAVED_AT, zero, 2)
        alone = {key: value for key, value in case.items() if key != "saves"}
        # Another stage too: 0 -> 1, 1 -> 2, 2 -> 0.
        alone |= {"overrides": overrides(tiny, kind, 1), "zero": (zero + 1) % 3}
        continued.append(alone | {"loads": str(checkpoint)})
    found = run_cases("deepspeed_source", continued, 1, folder / "one")
    for name, result in expected.items():
        torch.testing.assert_close(
            torch.tensor(found[name]["losses"]),
            torch.tensor(result["losses"]),
            rtol=1e-5,
            atol=0,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def test_every_weight_and_moment_is_read_and_training_continues(tmp_path: Path) -> None:
    check_routes(QUICK, tmp_path)


@pytest.mark.full
def test_every_layout_is_read(tmp_path: Path) -> None:
    check_routes(MORE, tmp_path)


GROUPS: dict[str, Callable[[torch.nn.Module], list[dict[str, Any]]]] = {
    "one": lambda model: [{"params": list(model.parameters())}],
    "matrices and vectors": lambda model: [
        {"params": [p for p in model.parameters() if p.dim() >= 2]},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ],
    "named": lambda model: [
        {"params": list(reversed(list(model.named_parameters())))},
    ],
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def plain_run(tiny: Tiny, groups: str, folder: Path) -> dict[str, torch.Tensor]:
    """Three steps of a program that knows nothing of this project but its model."""
    import deepspeed

    from pretrain.model.decoder import DecoderLM

    torch.manual_seed(0)
    recipe = load_recipe(str(tiny.recipe), overrides(tiny, "dense", 1))
    model = DecoderLM(recipe.model)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    optimizer = torch.optim.AdamW(GROUPS[groups](model), lr=1e-3)
    config = {"train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 1}
    with own_process():
        connect(1)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        for _ in range(3):
            tokens = torch.randint(0, 200, (8, 33))
            output = engine(tokens[:, :-1], tokens[:, 1:], 256.0)
            engine.backward(output.loss)
            engine.step()
        engine.save_checkpoint(str(folder), tag="global_step3")
    return {
        f"{name}/exp_avg": optimizer.state[parameter]["exp_avg"].clone()
        for name, parameter in model.named_parameters()
    } | {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("groups", GROUPS)
def test_whole_states_are_assigned_to_their_parameters(
    groups: str, tiny: Tiny, tmp_path: Path
) -> None:
    expected = plain_run(tiny, groups, tmp_path / "theirs")
    settings = overrides(tiny, "dense", 1)
    checkpoint = imported(tiny, settings, tmp_path / "theirs", tmp_path / "ours")
    from safetensors.torch import load_file

    found = load_file(next(checkpoint.glob("optimizer-*"))) | load_file(
        next(checkpoint.glob("weights-*"))
    )
    for name, tensor in expected.items():
        assert tensor.any() and torch.equal(found[name], tensor), name


def test_the_command_makes_a_checkpoint_that_a_run_branches_from(
    tiny: Tiny, tmp_path: Path
) -> None:
    plain_run(tiny, "one", tmp_path / "theirs")
    settings = overrides(tiny, "dense", 1)
    arguments = ["--from", "deepspeed", str(tmp_path / "theirs"), "--recipe", str(tiny.recipe)]
    arguments += [part for setting in settings for part in ("--set", setting)]
    arguments += ["--output", str(tmp_path / "ours"), "--json", "-"]
    done = subprocess.run([sys.executable, str(TOOL), *arguments], capture_output=True, text=True)
    assert done.returncode == DONE, done.stderr
    assert "counted 24 sequences" not in done.stdout and json.loads(done.stdout)["step"] == 3
    branch = [*settings, f"branch_from={tmp_path / 'ours'}"]
    with own_process():
        assert main(tiny.arguments(tmp_path / "run", *branch, steps=6)) == DONE
    assert next(row["step"] for row in curve(tmp_path / "run")) == 4


class RunsCode:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.path}",)


def test_what_cannot_continue_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    source = tmp_path / "theirs"
    plain_run(tiny, "one", source)
    settings = overrides(tiny, "dense", 1)
    refusals = {
        "optimizer={kind: lion, learning_rate: 1.0e-3}": (ConfigError, "set optimizer.kind=adamw"),
        "data.streaming=true": (ConfigError, "data.streaming=false"),
        "model.num_hidden_layers=3": (ConfigError, "groups of .* not known"),
        "model.intermediate_size=40": (CheckpointError, "instead of"),
    }
    for setting, (kind, words) in refusals.items():
        with pytest.raises(kind, match=words):
            imported(tiny, [*settings, setting], source, tmp_path / "out")
    path = source / "global_step3" / "mp_rank_00_model_states.pt"
    state = torch.load(path, weights_only=False)
    torch.save(state | {"optimizer": RunsCode(tmp_path / "ran")}, path)
    with pytest.raises(CheckpointError, match="without running code"):
        imported(tiny, settings, source, tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    torch.save(state | {"optimizer": None}, path)
    with pytest.raises(ConfigError, match="no optimizer states to continue with"):
        imported(tiny, settings, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
