"""A checkpoint with multi-token prediction: it drafts in the command, is exported without its
block, and is kept whole by safetensors.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pretrain.checkpoint.weights import load_state_dict
from pretrain.core.errors import DONE, USAGE, ConfigError
from pretrain.evaluation.generation.generate import generate
from pretrain.evaluation.generation.generators import open_generator
from pretrain.evaluation.generation.sampling import Sampling
from pretrain.export.convert import export_safetensors
from pretrain.export.writer import RECORD, open_exported_weights
from tests.support.tiny_checkpoint import Trained, make_trained
from tests.support.tool_runs import run_here


@pytest.fixture(scope="module")
def drafting(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return make_trained(
        tmp_path_factory.mktemp("drafting"), ("model.multi_token_prediction={loss_weight: 0.3}",)
    )


def test_the_command_writes_the_same_text_with_drafts_and_says_how_many_were_right(
    drafting: Trained,
) -> None:
    arguments = (
        "--prompt",
        "11 + 2 =",
        "--max-new-tokens",
        "60",
        "--greedy",
        "--draft",
        "--json",
        "-",
    )
    done = run_here("generate.py", "--model", drafting.latest, *arguments)
    assert done.returncode == DONE, done.stderr
    drafted, generator = (
        json.loads(done.stdout),
        open_generator(drafting.checkpoint, torch.device("cpu")),
    )
    prompt = generator.encode("11 + 2 =")
    plain = generate(
        generator.start(len(prompt) + 60),
        prompt,
        Sampling(greedy=True),
        generator.eod_id,
        range(60),
    )
    (text,) = drafted["samples"]
    assert text["text"] == generator.decode(plain) and text["new_tokens"] == 60
    assert 0 < drafted["accepted_share"] <= 1 and 30 <= drafted["drafted_tokens"] < 60
    assert "drafted tokens were accepted" in done.stderr


def test_drafts_of_a_model_that_has_none_are_refused(trained: Trained) -> None:
    refused = run_here(
        "generate.py", "--model", trained.latest, "--prompt", "1", "--draft", "--num-samples", "2"
    )
    assert refused.returncode == USAGE and "one text at a time" in refused.stderr
    with pytest.raises(ConfigError, match="without model.multi_token_prediction"):
        open_generator(trained.checkpoint, torch.device("cpu")).start_drafting(10)


def test_the_export_leaves_the_block_out_and_says_so(drafting: Trained, tmp_path: Path) -> None:
    output = tmp_path / "hf"
    done = run_here(
        "convert_checkpoint.py", "--checkpoint", drafting.latest, "--to", "hf", "--output", output
    )
    assert done.returncode == DONE, done.stderr
    own = [name for name in load_state_dict(drafting.checkpoint) if name.startswith("multi_token.")]
    assert f"left out {len(own)} tensors that no next token depends on: " in done.stdout
    record = json.loads((output / RECORD).read_text())
    assert sorted(record["left_out"]) == sorted(own) and record["parity"]["max_difference"] < 1e-4
    assert not any("multi_token" in name for name in open_exported_weights(output).names)
    with pytest.raises(ConfigError, match="leave --draft out"):
        open_generator(output, torch.device("cpu")).start_drafting(10)


def test_safetensors_keeps_the_block(drafting: Trained, tmp_path: Path) -> None:
    conversion = export_safetensors(
        drafting.checkpoint, tmp_path / "plain", torch.float32, overwrite=False
    )
    assert conversion.left_out == ()
    assert (
        set(open_exported_weights(tmp_path / "plain").names)
        == load_state_dict(drafting.checkpoint).keys()
        >= {"multi_token.projection.weight"}
    )
