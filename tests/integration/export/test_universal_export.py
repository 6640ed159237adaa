from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_pipeline.tokenizer.tokenizer import Tokenizer
from pretrain.checkpoint.layout import RECIPE
from pretrain.checkpoint.tensor_files import TensorReader
from pretrain.checkpoint.universal import (
    MODEL_FILES,
    UNIVERSAL_LATEST,
    UNIVERSAL_TAG,
    load_universal,
)
from pretrain.checkpoint.weights import OPTIMIZER, files_of, load_state_dict
from pretrain.config.load import recipe_to_yaml
from pretrain.core.errors import CheckpointError, ConfigError
from pretrain.export.convert import export_universal
from pretrain.train import main
from tests.support.random_checkpoint import random_checkpoint, recipe_of, small_tokenizer
from tests.support.tiny_run import make_tiny, make_trainer, own_process

KINDS = {
    "native": ["model.moe.kind=deepspeed", "model.moe.drop_tokens=false"],
    "peer": ["model.moe={kind: peer, product_key_sizes: [4, 4], query_dim: 8}"],
    "muon": ["optimizer.kind=muon"],
    "adamw_8bit": ["optimizer.kind=adamw_8bit"],
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real checkpoint of one rank, ZeRO stage 1, with a balancing bias."""
    folder = tmp_path_factory.mktemp("universal")
    with own_process():
        assert (
            main(
                make_tiny(folder).arguments(folder / "run", "model.moe.bias_balancing={}", steps=3)
            )
            == 0
        )
    return folder / "run" / "checkpoints" / "step_3"


def test_every_weight_and_its_optimizer_states_are_there(checkpoint: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in checkpoint.rglob("*")}
    conversion = export_universal(checkpoint, tmp_path / "out", overwrite=False)
    weights = load_state_dict(checkpoint)
    buffers = {name for name in weights if name.endswith("balance_bias")}
    assert conversion.tensors == len(weights) - len(buffers) and conversion.step == 3
    assert (tmp_path / "out" / UNIVERSAL_LATEST).read_text() == UNIVERSAL_TAG and (
        tmp_path / "out" / RECIPE
    ).is_file()
    universal = tmp_path / "out" / UNIVERSAL_TAG
    states = TensorReader(files_of(checkpoint, OPTIMIZER))
    for name in weights.keys() - buffers:
        expected = {"fp32": weights[name]} | {
            key: states.read(f"{name}/{key}") for key in ("exp_avg", "exp_avg_sq")
        }
        for key, tensor in expected.items():
            content = torch.load(universal / "zero" / name / f"{key}.pt", weights_only=True)
            assert torch.equal(content["param"], tensor), (name, key)
            is_expert = ".experts.w" in name
            assert content.get("is_expert_param", False) == is_expert
            assert content.get("ep_num_experts") == (len(tensor) if is_expert else None)
    for file in MODEL_FILES:
        content = torch.load(universal / file, weights_only=True)
        assert content["global_steps"] == 3
        assert content["module"].keys() == buffers
        assert all(torch.equal(content["module"][name], weights[name]) for name in buffers)
    assert {path: path.stat().st_mtime_ns for path in checkpoint.rglob("*")} == before


def test_a_damaged_optimizer_file_is_one_sentence(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "step_3")
    for path in files_of(tmp_path / "step_3", OPTIMIZER):
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        export_universal(tmp_path / "step_3", tmp_path / "out", overwrite=False)
    assert not (tmp_path / "out").exists()


def test_parameters_with_different_numbers_of_steps_are_refused(
    checkpoint: Path, tmp_path: Path
) -> None:
    shutil.copytree(checkpoint, tmp_path / "step_3")
    (path,) = files_of(tmp_path / "step_3", OPTIMIZER)
    tensors = load_file(path)
    tensors["head.weight/step"] -= 1
    save_file(tensors, path)
    with pytest.raises(ConfigError, match="'head.weight' has taken 2 steps and .* 3"):
        export_universal(tmp_path / "step_3", tmp_path / "out", overwrite=False)


def test_what_deepspeed_cannot_load_is_refused_before_anything_is_written(
    checkpoint: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    for name, overrides in KINDS.items():
        shutil.copytree(checkpoint, tmp_path / name)
        (tmp_path / name / RECIPE).write_text(recipe_to_yaml(recipe_of("debug", *overrides)))
    random_checkpoint(tmp_path / "alone", recipe_of("debug"), tokenizer)
    refusals = {
        "native": "model.moe.kind=deepspeed has no universal",
        "peer": "model.moe.kind=peer has no universal",
        "muon": "optimizer.kind=muon has no universal",
        "adamw_8bit": "optimizer.kind=adamw_8bit has no universal",
        "alone": "weights alone",
    }
    for name, words in refusals.items():
        with pytest.raises(ConfigError, match=words):
            export_universal(tmp_path / name, tmp_path / "out", overwrite=False)


def test_another_folder_is_not_loaded_as_a_universal_checkpoint(
    checkpoint: Path, tmp_path: Path
) -> None:
    with own_process():
        trainer = make_trainer(make_tiny(tmp_path), tmp_path / "run", zero=1)
    with pytest.raises(CheckpointError, match="is no universal checkpoint"):
        load_universal(trainer.engine.deepspeed, checkpoint)
