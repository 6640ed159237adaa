"""Real runs of the training command on several sources, on packed documents, from a stream, and
without a validation split.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Library
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from data_pipeline.loading.best_fit import pack_path
from pretrain.core.errors import DONE, CheckpointError, ConfigError, DataError
from pretrain.evaluation.heldout.heldout import score_checkpoint
from pretrain.train import main
from tests.support.data_folder import write_folder
from tests.support.tiny_run import curve, own_process

RECIPE = """\
name: mixed
seed: 7
data: {path: DATA, document_mask: true}
model:
  hidden_size: 16
  num_hidden_layers: 1
  max_position_embeddings: 32
  attention: {kind: gqa, num_attention_heads: 2, num_key_value_heads: 1, head_dim: 8}
  moe: {kind: dropless, num_experts: 2, top_k: 1, moe_intermediate_size: 8}
train: {sequence_length: 16, micro_batch_size: 2, global_batch_size: 4, train_tokens: 256, precision: fp32}
optimizer: {kind: adamw, learning_rate: 3.0e-3}
schedule: {kind: constant}
checkpoint: {interval_steps: 2}
validation: {interval_steps: 2}
logging: {interval_steps: 1, tensorboard: false}
"""


@pytest.fixture(autouse=True)
def in_process() -> Iterator[None]:
    with own_process():
        yield


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a recipe and data of two sources, of which only one has held-out documents."""
    library = Library(
        BPE(
            vocab={
                character: number for number, character in enumerate(sorted(ByteLevel.alphabet()))
            },
            merges=[],
        )
    )
    library.pre_tokenizer = ByteLevel(add_prefix_space=False)
    library.add_special_tokens(["<|endoftext|>"])
    random = np.random.default_rng(0)
    documents = [
        [*random.integers(1, 250, size).tolist(), 256]
        for size in random.integers(3, 40, 60).tolist()
    ]
    train = {"web": [documents[:25], documents[25:30]], "code": [documents[30:50]]}
    write_folder(
        tmp_path / "data",
        train,
        {"web": [documents[50:]]},
        vocab_size=257,
        tokenizer=library.to_str(),
    )
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("DATA", str(tmp_path / "data")))
    return tmp_path


def train(project: Path, run: str, *overrides: str, steps: int = 4) -> list[dict[str, Any]]:
    settings = [f"run_path={project / run}", f"train.train_tokens={steps * 64}", *overrides]
    arguments = [
        "--recipe",
        str(project / "recipe.yaml"),
        *(part for setting in settings for part in ("--set", setting)),
    ]
    assert main(arguments) == DONE
    return curve(project / run)


def state_of(project: Path, run: str, step: int) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(
        (project / run / "checkpoints" / f"step_{step}" / "state.json").read_text()
    )
    return state


WEIGHTS = ["data.mixture={kind: weights, weights: {web: 1, code: 3}}"]
BEST_FIT = ["data.packing.kind=best_fit"]


@pytest.mark.parametrize("overrides", [WEIGHTS, BEST_FIT])
def test_a_run_in_two_parts_is_the_run_in_one(project: Path, overrides: list[str]) -> None:
    expected = train(project, "one", *overrides)
    train(project, "two", *overrides, steps=2)
    whole = train(project, "two", *overrides)
    losses = [row["loss"] for row in whole if row["kind"] == "train"]
    assert (
        losses == [row["loss"] for row in expected if row["kind"] == "train"] and len(losses) == 4
    )
    other = train(project, "other", *overrides, "seed=8")
    assert [row["loss"] for row in other if row["kind"] == "train"] != losses
    assert pack_path(project / "data" / "train-web-00000", 16).exists() == (overrides == BEST_FIT)
    state = state_of(project, "one", 4)["data"]
    assert [plan["start_sample"] for plan in state["plans"]] == [0] and list(
        state["plans"][0]["sources"]
    ) == ["web", "code"]


def test_another_mixture_goes_on_where_each_source_was_and_other_data_is_refused(
    project: Path,
) -> None:
    train(project, "run", steps=2)
    train(project, "run", *WEIGHTS)
    plans = state_of(project, "run", 4)["data"]["plans"]
    assert [plan["start_sample"] for plan in plans] == [0, 8] and sum(
        source["taken"] for source in plans[1]["sources"].values()
    ) == 8
    with pytest.raises(ConfigError, match="names 'wbe'.*did you mean 'web'"):
        train(project, "run", "data.mixture={kind: weights, weights: {wbe: 1, code: 1}}", steps=6)
    with pytest.raises(ConfigError, match="names 'wbe'"):
        main(
            [
                "--dry-run",
                "--recipe",
                str(project / "recipe.yaml"),
                "--set",
                "data.mixture={kind: proportional, max_epochs: {wbe: 1}}",
            ]
        )
    with pytest.raises(ConfigError, match=r"another data\.packing"):
        train(project, "run", *BEST_FIT, steps=6)
    score = score_checkpoint(
        project / "run" / "checkpoints" / "step_4", None, "validation", torch.device("cpu")
    )
    assert score.bigram is not None and score.bigram.windows == 16
    documents = [[5] * 30 + [256]] * 20
    write_folder(
        project / "other",
        {"web": [documents], "code": [documents]},
        None,
        257,
        tokenizer=(project / "data" / "tokenizer.json").read_text(),
    )
    with pytest.raises(DataError, match=r"source 'web' is not what it was"):
        train(project, "run", *WEIGHTS, f"data.path={project / 'other'}", steps=6)
    with pytest.raises(DataError, match="trained on other shards"):
        score_checkpoint(
            project / "run" / "checkpoints" / "step_4",
            project / "other",
            "train",
            torch.device("cpu"),
        )


def test_several_folders_are_mixed_by_name(project: Path) -> None:
    datasets = f"data.corpora={{one: {project / 'data'}, two: {project / 'data'}}}"
    rows = train(
        project,
        "run",
        "data.path=null",
        datasets,
        "data.mixture={kind: weights, weights: {one: 1, two: 1}}",
    )
    assert [row["kind"] for row in rows].count("validation") == 2
    assert list(state_of(project, "run", 4)["data"]["plans"][0]["sources"]) == ["one", "two"]


def test_without_a_validation_split_a_run_trains_and_evaluation_says_why_not(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    documents = [[*range(1, 20), 256]] * 20
    write_folder(
        project / "all",
        {"web": [documents]},
        None,
        257,
        tokenizer=(project / "data" / "tokenizer.json").read_text(),
    )
    rows = train(project, "run", f"data.path={project / 'all'}", "checkpoint.keep_best=true")
    assert [row["kind"] for row in rows] == ["train"] * 4
    assert "no validation split" in capsys.readouterr().out
    assert state_of(project, "run", 4)["validation_loss"] is None
    checkpoint = project / "run" / "checkpoints" / "step_4"
    with pytest.raises(DataError, match="has no validation split"):
        score_checkpoint(checkpoint, None, "validation", torch.device("cpu"))
    assert score_checkpoint(checkpoint, None, "train", torch.device("cpu")).targets > 0


def test_limits_that_are_too_small_for_the_run_are_told_before_it_starts(project: Path) -> None:
    with pytest.raises(DataError, match=r"max_epochs allows \d+ samples"):
        train(
            project, "run", "data.mixture={kind: proportional, max_epochs: {web: 0.1, code: 0.1}}"
        )
    assert not list((project / "run").glob("checkpoints/step_*"))


def test_a_streamed_run_in_two_parts_is_the_run_in_one(project: Path) -> None:
    (project / "lines.txt").write_text(
        "".join(f"line {number} of a stream\n" for number in range(80))
    )
    source = f"data.source={{kind: text, document: line, input: [{project / 'lines.txt'}]}}"
    tokenizer = f"data.tokenizer={{kind: file, path: {project / 'data' / 'tokenizer.json'}}}"
    stream = [source, tokenizer, "data.streaming=true"]
    expected = train(project, "one", *stream)
    train(project, "two", *stream, steps=2)
    assert [row["loss"] for row in train(project, "two", *stream) if row["kind"] == "train"] == [
        row["loss"] for row in expected if row["kind"] == "train"
    ]
    with pytest.raises((DataError, CheckpointError), match="--no-bigram"):
        score_checkpoint(
            project / "one" / "checkpoints" / "step_4", None, "validation", torch.device("cpu")
        )
    assert (
        score_checkpoint(
            project / "one" / "checkpoints" / "step_4",
            None,
            "validation",
            torch.device("cpu"),
            baselines=(),
        ).targets
        > 0
    )
    with pytest.raises(ConfigError, match=r"another data\.streaming"):
        train(project, "two", steps=6)
