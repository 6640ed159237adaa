"""The command, from a trained checkpoint to Megatron's and back."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from pretrain.checkpoint import layout
from pretrain.checkpoint.weights import load_model, load_state_dict
from pretrain.core.errors import BAD_CHECKPOINT, DONE, USAGE
from tests.support.fork_server import run_python
from tests.support.paths import TOOLS
from tests.support.random_checkpoint import random_checkpoint, recipe_of, small_tokenizer
from tests.support.tiny_checkpoint import STEPS, Trained

TOOL = TOOLS / "convert_checkpoint.py"


def test_a_trained_checkpoint_goes_to_megatron_and_back(trained: Trained, tmp_path: Path) -> None:
    out, back = tmp_path / "megatron", tmp_path / "back"
    to = ("--checkpoint", trained.latest, "--to", "megatron", "--output", out)
    done = run_python(TOOL, *to, "--json", "-")
    assert done.returncode == DONE, done.stderr
    result = json.loads(done.stdout)
    assert (result["target"], result["step"], result["parity"]) == ("megatron", STEPS, None)
    inner = out / f"iter_{STEPS:07d}"
    assert (out / "latest_checkpointed_iteration.txt").read_text() == str(STEPS)
    assert {path.name for path in inner.iterdir()} == {
        ".metadata",
        "__0_0.distcp",
        "common.pt",
        "metadata.json",
    }
    assert (
        f"--num-layers={trained.recipe.model.num_hidden_layers}\n"
        in (out / "megatron_options.txt").read_text()
    )

    done = run_python(TOOL, "--from", "megatron", out, "--output", back, "--json", "-")
    assert done.returncode == DONE, done.stderr
    assert layout.damage(back) is None and layout.read_state(back)["step"] == STEPS
    before, after = load_state_dict(trained.checkpoint), load_state_dict(back)
    assert before.keys() == after.keys()
    size = trained.manifest.tokenizer.vocab_size
    for name, tensor in after.items():
        rows = size if name in ("embedding.weight", "head.weight") else None
        assert torch.equal(tensor[:rows], before[name][:rows]), name
    # The same text, the same tokens, the same logits.
    tokenizer = (back / layout.TOKENIZER).read_bytes()
    assert tokenizer == trained.manifest.tokenizer_path.read_bytes()
    model, _ = load_model(back)
    ids_BS = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.equal(model.logits(ids_BS), trained.model.logits(ids_BS))

    # What Megatron-LM has saved behind it is not deleted.
    (out / "iter_0000999").mkdir()
    done = run_python(TOOL, *to, "--overwrite")
    assert done.returncode == USAGE and "iter_0000999" in done.stderr
    (out / "iter_0000999").rmdir()
    done = run_python(TOOL, *to, "--overwrite", "--dtype", "bfloat16")
    assert done.returncode == DONE, done.stderr


def test_nothing_is_written_for_a_model_that_megatron_cannot_say_or_a_damaged_one(
    tmp_path: Path,
) -> None:
    out, back = tmp_path / "out", tmp_path / "back"
    windows = recipe_of("debug", "model.attention.sliding_window=8")
    random_checkpoint(tmp_path / "windows", windows, small_tokenizer())
    to = ("--to", "megatron", "--output", out)
    done = run_python(TOOL, "--checkpoint", tmp_path / "windows", *to)
    assert done.returncode == USAGE and "model.attention.sliding_window is 8" in done.stderr
    assert not out.exists()
    random_checkpoint(tmp_path / "plain", recipe_of("debug"), small_tokenizer())
    done = run_python(TOOL, "--checkpoint", tmp_path / "plain", *to)
    assert done.returncode == DONE, done.stderr
    (data,) = out.glob("iter_*/*.distcp")
    data.write_bytes(data.read_bytes()[:-1])
    done = run_python(TOOL, "--from", "megatron", out, "--output", back)
    assert done.returncode == BAD_CHECKPOINT and "cut off" in done.stderr
    assert not back.exists()
