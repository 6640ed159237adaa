from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from data_pipeline.tokenizer.tokenizer import Tokenizer
from pretrain.checkpoint.layout import DEEPSPEED_TAG, DS_CONFIG, RECIPE
from pretrain.checkpoint.universal import UNIVERSAL_LATEST, UNIVERSAL_TAG, load_universal
from pretrain.checkpoint.weights import load_state_dict
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
    "dense": ["model.layer_pattern.kind=all_dense", "model.intermediate_size=48"],
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
    weights = {
        name: tensor
        for name, tensor in load_state_dict(checkpoint).items()
        if not name.endswith("balance_bias")
    }
    assert conversion.tensors == len(weights) and conversion.step == 3
    assert (tmp_path / "out" / UNIVERSAL_LATEST).read_text() == UNIVERSAL_TAG and (
        tmp_path / "out" / RECIPE
    ).is_file()
    zero = tmp_path / "out" / UNIVERSAL_TAG / "zero"
    for name, weight in weights.items():
        content = torch.load(zero / name / "fp32.pt", weights_only=False)
        found = content["param"] if isinstance(content, dict) else content
        assert torch.equal(found.reshape(weight.shape), weight)
        assert (zero / name / "exp_avg.pt").is_file() and (zero / name / "exp_avg_sq.pt").is_file()
    assert {path: path.stat().st_mtime_ns for path in checkpoint.rglob("*")} == before


def test_a_weight_that_differs_from_the_checkpoint_is_noticed(
    checkpoint: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """DeepSpeed's files of one checkpoint beside the weights of another."""
    shutil.copytree(checkpoint, tmp_path / "step_3")
    other = tmp_path / "other"
    random_checkpoint(other, recipe_of("debug"), tokenizer)
    for path in other.glob("weights-*"):
        shutil.copyfile(path, tmp_path / "step_3" / path.name)
    with pytest.raises(CheckpointError, match="nothing was published"):
        export_universal(tmp_path / "step_3", tmp_path / "out", overwrite=False)
    assert not (tmp_path / "out").exists()


def test_damaged_files_of_deepspeed_are_one_sentence(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "step_3")
    for path in (tmp_path / "step_3" / DEEPSPEED_TAG).glob("*optim_states.pt"):
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="DeepSpeed's converter fails"):
        export_universal(tmp_path / "step_3", tmp_path / "out", overwrite=False)
    assert not (tmp_path / "out").exists()


def test_what_deepspeeds_converter_cannot_do_is_refused_before_it_starts(
    checkpoint: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    shutil.copytree(checkpoint, tmp_path / "stage_0")
    (tmp_path / "stage_0" / DS_CONFIG).write_text(json.dumps({"zero_optimization": {"stage": 0}}))
    for name, overrides in KINDS.items():
        shutil.copytree(checkpoint, tmp_path / name)
        (tmp_path / name / RECIPE).write_text(recipe_to_yaml(recipe_of("debug", *overrides)))
    random_checkpoint(tmp_path / "alone", recipe_of("debug"), tokenizer)
    refusals = {
        "stage_0": "ZeRO stage 0",
        "native": "model.moe.kind=deepspeed has no universal",
        "peer": "model.moe.kind=peer has no universal",
        "muon": "optimizer.kind=muon has no universal",
        "adamw_8bit": "optimizer.kind=adamw_8bit has no universal",
        "dense": "a dense model has no universal",
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
