from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_pipeline.token_stream import open_split
from pretrain.checkpoint import layout
from pretrain.checkpoint.weights import DENSE_FILE, load_state_dict
from pretrain.config.errors import BAD_CHECKPOINT, BAD_DATA, DONE, USAGE, CheckpointError
from pretrain.config.load import recipe_to_yaml
from pretrain.export.convert import export_hf, export_safetensors
from pretrain.export.writer import read_weights
from tests.export.tiny_checkpoint import STEPS, Trained, make_data, seal

TOOL = Path(__file__).resolve().parents[2] / "tools" / "convert_checkpoint.py"


def convert(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), *map(str, arguments)], capture_output=True, text=True, timeout=300)


def changed_copy(trained: Trained, folder: Path, overrides: dict[str, object]) -> Path:
    """A whole checkpoint whose recipe's MoE section says something else."""
    checkpoint = folder / trained.checkpoint.name
    shutil.copytree(trained.checkpoint, checkpoint)
    model = trained.recipe.model
    assert model.moe is not None
    changed = trained.recipe.model_copy(update={"model": model.model_copy(update={"moe": model.moe.model_copy(update=overrides)})})
    (checkpoint / layout.RECIPE).write_text(recipe_to_yaml(changed))
    seal(checkpoint)
    return checkpoint


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_hf_export_is_compared_published_and_opens_in_transformers(trained: Trained, tmp_path: Path, dtype: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = convert("--checkpoint", trained.latest, "--to", "hf", "--output", tmp_path / "out", "--dtype", dtype, "--json", "-")
    assert done.returncode == DONE, done.stderr
    result = json.loads(done.stdout)
    assert result["parity"]["windows"] == 8 and result["parity"]["max_difference"] <= 1e-4 < result["parity"]["logits_std"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == getattr(torch, dtype) and model.config.vocab_size == trained.manifest.tokenizer.vocab_size
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = tokenizer("11 + 2 =", return_tensors="pt").input_ids
    with torch.inference_mode():
        ours, theirs = trained.model.logits(prompt), model(prompt).logits.float()
    assert (ours - theirs).abs().max() < (1e-4 if dtype == "float32" else 0.3)
    assert tokenizer.decode(model.generate(prompt, max_new_tokens=8, do_sample=False)[0]).startswith("11 + 2 =")


def test_plain_safetensors_hold_every_weight_bit_for_bit(trained: Trained, tmp_path: Path) -> None:
    done = convert("--checkpoint", trained.checkpoint, "--to", "safetensors", "--output", tmp_path / "out")
    assert done.returncode == DONE, done.stderr
    expected, written = load_state_dict(trained.checkpoint), read_weights(tmp_path / "out")
    assert expected.keys() == written.keys() and all(torch.equal(expected[name], written[name]) for name in expected)
    assert json.loads((tmp_path / "out" / "export.json").read_text())["step"] == STEPS
    assert (tmp_path / "out" / layout.RECIPE).read_text() == (trained.checkpoint / layout.RECIPE).read_text()


def test_an_earlier_export_is_replaced_only_when_asked(trained: Trained, tmp_path: Path) -> None:
    export_safetensors(trained.checkpoint, tmp_path / "out", torch.float32, overwrite=False)
    arguments = ("--checkpoint", trained.checkpoint, "--to", "safetensors", "--output", tmp_path / "out")
    refused = convert(*arguments, "--dtype", "bfloat16")
    assert refused.returncode == USAGE and "--overwrite" in refused.stderr and "Traceback" not in refused.stderr
    assert convert(*arguments, "--dtype", "bfloat16", "--overwrite").returncode == DONE
    assert {tensor.dtype for tensor in read_weights(tmp_path / "out").values()} == {torch.bfloat16}


def test_a_model_without_counterpart_is_refused_with_its_reason(trained: Trained, tmp_path: Path) -> None:
    checkpoint = changed_copy(trained, tmp_path, {"num_shared_experts": 1})
    refused = convert("--checkpoint", checkpoint, "--to", "hf", "--output", tmp_path / "out")
    assert refused.returncode == USAGE and "num_shared_experts is 1" in refused.stderr and "Traceback" not in refused.stderr
    assert not (tmp_path / "out").exists()


def test_data_of_another_tokenizer_is_refused(trained: Trained, tmp_path: Path) -> None:
    make_data(tmp_path / "other", {"a.txt": "quite another text\n" * 50, "b.txt": "and one more\n" * 50}, vocab_size=260)
    refused = convert("--checkpoint", trained.checkpoint, "--to", "hf", "--output", tmp_path / "out", "--data", tmp_path / "other")
    assert refused.returncode == BAD_DATA and "another tokenizer" in refused.stderr and "Traceback" not in refused.stderr


def test_a_damaged_checkpoint_is_refused(trained: Trained, tmp_path: Path) -> None:
    checkpoint = tmp_path / trained.checkpoint.name
    shutil.copytree(trained.checkpoint, checkpoint)
    weights = bytearray((checkpoint / DENSE_FILE).read_bytes())
    weights[-5] ^= 1
    (checkpoint / DENSE_FILE).write_bytes(weights)
    refused = convert("--checkpoint", checkpoint, "--to", "hf", "--output", tmp_path / "out")
    assert refused.returncode == BAD_CHECKPOINT and DENSE_FILE in refused.stderr and "Traceback" not in refused.stderr
    assert not (tmp_path / "out").exists()


def test_an_export_whose_logits_differ_is_not_published(trained: Trained, tmp_path: Path) -> None:
    """A weight that is not a number makes every logit differ from itself."""
    checkpoint = tmp_path / trained.checkpoint.name
    shutil.copytree(trained.checkpoint, checkpoint)
    weights = load_file(checkpoint / DENSE_FILE)
    weights["layers.0.attention.q_proj.weight"][0, 0] = torch.inf
    save_file(weights, checkpoint / DENSE_FILE)
    heldout = open_split(trained.manifest, "validation")
    with pytest.raises(CheckpointError, match="nothing was published"):
        export_hf(checkpoint, tmp_path / "out", heldout, torch.float32, overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.name]
