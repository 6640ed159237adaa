"""data.order=megatron gives what Megatron's own builder, data sets and sampler give."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from data_pipeline.loading.megatron.files import FOLDER
from pretrain.core.errors import BAD_DATA, DONE, USAGE
from tests.support.data_folder import write_folder
from tests.support.fork_server import run_python
from tests.support.tiny_run import curve

# Documents of each data set, of about 30 tokens each, and what Megatron is asked for.
CASES: dict[str, dict[str, Any]] = {
    "part of an epoch": {"documents": [60], "length": 16, "samples": 40, "seed": 1234},
    "an odd length, in several shards": {
        "documents": [61],
        "length": 13,
        "samples": 96,
        "seed": 1,
        "shards": 3,
    },
    "a last epoch apart": {"documents": [30], "length": 17, "samples": 120, "seed": 2},
    "a last epoch with the others": {"documents": [30], "length": 16, "samples": 152, "seed": 3},
    "positions and mask reset": {
        "documents": [40],
        "length": 24,
        "samples": 40,
        "seed": 4,
        "reset": True,
    },
    "reset, and no loss on ends": {
        "documents": [40],
        "length": 24,
        "samples": 40,
        "seed": 5,
        "reset": True,
        "eod_mask_loss": True,
    },
    "no loss on ends": {
        "documents": [40],
        "length": 24,
        "samples": 40,
        "seed": 6,
        "eod_mask_loss": True,
    },
    "a blend with weights": {
        "documents": [40, 25, 9],
        "length": 15,
        "samples": 160,
        "seed": 4294967295,
        "weights": [0.55, 0.3, 0.15],
        "shards": 2,
    },
    "a blend of one": {"documents": [40], "length": 16, "samples": 80, "seed": 7, "weights": [2.0]},
    "a blend without weights": {"documents": [30, 20], "length": 16, "samples": 64, "seed": 8},
    # As many documents as give the test one: Megatron loops for ever over a split of none.
    "a split": {"documents": [600], "length": 64, "samples": 80, "seed": 9, "split": "969,30,1"},
    "a blend of splits": {
        "documents": [77, 33],
        "length": 11,
        "samples": 96,
        "seed": 10,
        "weights": [1.0, 3.0],
        "split": "80,15.5,4.5",
    },
}
# The counterpart: it must be seen as different.
OTHER_SEED = {**CASES["a last epoch apart"], "shift": 1}


def tokenizer() -> str:
    """A tokenizer of bytes, whose token 0 ends a document."""
    entries = ["<|endoftext|>", *sorted(ByteLevel.alphabet())]
    vocab = {entry: number for number, entry in enumerate(entries)}
    library = Tokenizer(BPE(vocab=vocab, merges=[]))
    library.pre_tokenizer = ByteLevel(add_prefix_space=False)
    library.add_special_tokens(["<|endoftext|>"])
    content: str = library.to_str()
    return content


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Every case, in one process: importing Megatron takes seconds."""
    cases = {**CASES, "another seed": OTHER_SEED}
    path = tmp_path_factory.mktemp("cases") / "cases.json"
    content = [{**case, "tokenizer": tokenizer()} for case in cases.values()]
    path.write_text(json.dumps(content))
    done = run_python("-m", "tests.support.workers.megatron_order", path, timeout=600)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return dict(zip(cases, map(json.loads, lines), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_files_and_sequences_are_megatrons_on_any_number_of_ranks(
    name: str, results: dict[str, dict[str, Any]]
) -> None:
    case, found = CASES[name], results[name]
    kinds = ["GPTDataset-train-" + index for index in ("document", "sample", "shuffle")]
    blended = ["dataset", "dataset_sample"]
    expected = [f"{kind}_index.npy" for kind in kinds] * len(case["documents"])
    if "weights" in case or len(case["documents"]) > 1:
        expected += [f"BlendedDataset-train-{index}_index.npy" for index in blended]
    assert found["equal"] == sorted(expected) and found["files"] == len(expected)
    assert found["different"] == 0
    # Each step's batch once for each of the three numbers of ranks.
    assert found["compared"] == 3 * (case["samples"] // 8) * 8 > 0


def test_another_seed_is_another_order(results: dict[str, dict[str, Any]]) -> None:
    found = results["another seed"]
    assert "GPTDataset-train-shuffle_index.npy" not in found["equal"]
    assert found["different"] > found["compared"] // 2


RECIPE = """\
name: moved
seed: 1234
data: {path: DATA, order: megatron, document_mask: true}
model:
  hidden_size: 16
  num_hidden_layers: 1
  max_position_embeddings: 32
  attention: {kind: gqa, num_attention_heads: 2, num_key_value_heads: 1, head_dim: 8}
  moe: {kind: dropless, num_experts: 2, top_k: 1, moe_intermediate_size: 8}
train: {sequence_length: 16, micro_batch_size: 2, global_batch_size: 4, train_tokens: 512, precision: fp32}
optimizer: {kind: adamw, learning_rate: 3.0e-3}
schedule: {kind: constant}
checkpoint: {interval_steps: 2}
logging: {interval_steps: 1, tensorboard: false}
"""


def train(project: Path, run: str, fault: str = "", **settings: object) -> tuple[int, str]:
    """The exit code and the standard error of a real training run."""
    arguments = ["-m", "pretrain", "--recipe", str(project / "recipe.yaml")]
    for name, value in {"run_path": project / run, **settings}.items():
        arguments += ["--set", f"{name.replace('__', '.')}={value}"]
    environment = {**os.environ, **({"FAULT": fault} if fault else {})}
    done = run_python(*arguments, env=environment, timeout=300)
    return done.returncode, done.stderr


def losses(project: Path, run: str) -> list[float]:
    return [row["loss"] for row in curve(project / run) if row["kind"] == "train"]


def test_a_killed_run_continues_in_the_same_order(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    texts = [
        [*random.integers(1, 257, size).tolist(), 0] for size in random.integers(3, 40, 60).tolist()
    ]
    write_folder(tmp_path / "data", {"all": [texts]}, vocab_size=257, tokenizer=tokenizer())
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("DATA", str(tmp_path / "data")))
    code, _ = train(tmp_path, "whole")
    assert code == DONE and len(losses(tmp_path, "whole")) == 8
    assert len(list((tmp_path / "data" / FOLDER).glob("*-GPTDataset-train-*.npy"))) == 3
    # The sixth step dies; the last checkpoint is of step 4.
    code, _ = train(tmp_path, "killed", "kill@step.begin:6")
    assert code == -signal.SIGKILL
    code, _ = train(tmp_path, "killed")
    assert code == DONE
    assert losses(tmp_path, "killed") == losses(tmp_path, "whole")
    shuffled = {"data__order": "shuffled"}
    assert train(tmp_path, "other", **shuffled)[0] == DONE
    assert losses(tmp_path, "other") != losses(tmp_path, "whole")
    code, message = train(tmp_path, "killed", train__train_tokens=1024)
    assert code == BAD_DATA and "data.order.samples=32" in message
    code, message = train(tmp_path, "killed", **shuffled)
    assert code == USAGE and "another data.order.kind" in message
