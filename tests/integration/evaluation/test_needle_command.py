"""tools/evaluate.py --needle on real checkpoints, and the recipe that learns from its corpus."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from data_pipeline.shards.manifest import load_manifest
from data_pipeline.shards.token_stream import open_split
from pretrain.checkpoint.layout import read_recipe
from pretrain.core.errors import BAD_DATA, DONE, IO_FAILED, USAGE
from pretrain.evaluation.needle.score import NeedleOptions, score_checkpoint_needles
from pretrain.model.positions.config import Rope
from tests.support.long_context import (
    LONG_STEPS,
    LONG_TOKENS,
    SHORT_STEPS,
    SHORT_TOKENS,
    LongContext,
    make_long_context,
)
from tests.support.tiny_checkpoint import Trained, make_trained
from tests.support.tiny_run import curve
from tests.support.tool_runs import Done, run_here

CPU = torch.device("cpu")


def evaluate(*arguments: str | Path) -> Done:
    return run_here("evaluate.py", *arguments)


@pytest.fixture(scope="module")
def long_context(tmp_path_factory: pytest.TempPathFactory) -> LongContext:
    return make_long_context(tmp_path_factory.mktemp("long_context"))


def test_a_model_of_text_is_asked_for_magic_numbers(trained: Trained, tmp_path: Path) -> None:
    plot, path = tmp_path / "plot.png", tmp_path / "result.json"
    done = evaluate(
        *("--checkpoint", trained.latest, "--needle", "256", "160", "--needle-samples", "3"),
        *("--depths", "0", "1", "--positions", "trained", "yarn", "--plot", plot, "--json", path),
    )
    assert done.returncode == DONE, done.stderr
    assert "## Needles of the form magic-number, 3 at each length and depth" in done.stdout
    assert "| positions | context, tokens | depth 0 | depth 1 |" in done.stdout
    assert "\n| yarn | 256 | 0.0000 | " in done.stdout
    result = json.loads(path.read_text())
    # Held-out text is scored only if it is asked for.
    assert "loss" not in result and result["needles"]["trained_length"] == 32
    variants = result["needles"]["variants"]
    assert set(variants) == {"rope", "yarn"} and list(variants["rope"]) == ["160", "256"]
    # Trained on sums for a few steps, it knows no magic number, and digits are not all alike to it.
    for by_length in variants.values():
        for by_depth in by_length.values():
            for cell in by_depth.values():
                assert cell["accuracy"] == 0.0 and 1.0 < cell["loss"] < 30.0
    assert variants["rope"]["256"] != variants["yarn"]["256"]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_lengths_and_needles_share_one_plot_and_one_result(
    trained: Trained, tmp_path: Path
) -> None:
    plot = tmp_path / "both.png"
    done = evaluate(
        *("--checkpoint", trained.latest, "--needle", "160", "--needle-samples", "1"),
        *("--lengths", "32", "64", "--max-windows", "2", "--plot", plot),
    )
    assert done.returncode == DONE, done.stderr
    assert "## Context lengths" in done.stdout and "## Needles of the form" in done.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_batch_size_changes_nothing(trained: Trained) -> None:
    options = NeedleOptions([160], [0.0, 0.7], samples=3)
    alone, together = (
        score_checkpoint_needles(trained.checkpoint, options, CPU, batch_size)["variants"]["rope"]
        for batch_size in (1, 3)
    )
    for depth, cell in alone["160"].items():
        assert cell["loss"] == pytest.approx(together["160"][depth]["loss"], rel=1e-5)


@pytest.mark.parametrize(
    "options,code,said",
    [
        (("--needle", "0"), USAGE, "--needle has 0: give 1 token or more"),
        (("--needle", "20"), USAGE, "and a needle with its question takes"),
        (("--needle", "1000000"), BAD_DATA, "filler of one context needs 1000000"),
        (("--needle", "256", "--depths", "2"), USAGE, "--depths has 2.0"),
        (("--needle", "256", "--needle-samples", "0"), USAGE, "--needle-samples is 0"),
        (("--depths", "0.5"), USAGE, "--depths belongs to --needle"),
        (("--needle-form", "pairs"), USAGE, "--needle-form belongs to --needle"),
        (("--needle", "256", "--positions", "alibi"), USAGE, "another family of encodings"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_one_sentence(
    options: tuple[str, ...], code: int, said: str, trained: Trained
) -> None:
    refused = evaluate("--checkpoint", trained.latest, *options)
    assert refused.returncode == code, refused.stderr
    assert said in refused.stderr and "Traceback" not in refused.stderr


def test_a_plot_that_cannot_be_written_is_a_storage_error(trained: Trained) -> None:
    refused = evaluate(
        *("--checkpoint", trained.latest, "--needle", "160", "--needle-samples", "1"),
        *("--plot", "/proc/needles.png"),
    )
    assert refused.returncode == IO_FAILED and "choose another --plot" in refused.stderr


def test_more_tokens_than_a_table_of_positions_has_are_refused(tmp_path: Path) -> None:
    trained = make_trained(
        tmp_path, ("model.position={kind: learned}", "model.max_position_embeddings=256")
    )
    refused = evaluate("--checkpoint", trained.latest, "--needle", "256", "512")
    assert refused.returncode == USAGE
    assert "--needle has 512 tokens, and the model has a learned vector for each" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_an_export_is_asked_the_same_and_no_more_than_its_positions(
    trained: Trained, exported: Path
) -> None:
    asked = ("--needle", "160", "256", "--needle-samples", "2", "--depths", "0.5", "--json", "-")
    ours = evaluate("--checkpoint", trained.latest, *asked)
    theirs = evaluate("--checkpoint", exported, "--data", trained.data, *asked)
    assert (ours.returncode, theirs.returncode) == (DONE, DONE), ours.stderr + theirs.stderr
    (own,) = json.loads(ours.stdout)["needles"]["variants"].values()
    (other,) = json.loads(theirs.stdout)["needles"]["variants"].values()
    for length, by_depth in own.items():
        for depth, cell in by_depth.items():
            assert cell["loss"] == pytest.approx(other[length][depth]["loss"], rel=1e-4)
    longest = trained.recipe.model.max_position_embeddings
    refused = evaluate("--checkpoint", exported, "--data", trained.data, "--needle", "4096")
    assert refused.returncode == USAGE
    assert f"--needle has 4096 tokens, and {exported} has {longest} positions" in refused.stderr


# --- the synthetic corpus and its recipe ----------------------------------------------------------


def test_every_window_of_the_corpus_is_one_document(long_context: LongContext) -> None:
    """Sequences of training begin with a document: the blocks of a source are its documents."""
    manifest = load_manifest(str(long_context.data))
    for split in ("train", "validation"):
        stream = open_split(manifest, split)
        starts = stream.document_starts(0, stream.num_tokens)
        lengths = set(map(int, starts[1:] - starts[:-1]))
        assert lengths == {SHORT_TOKENS, LONG_TOKENS}


def test_the_corpus_is_not_written_twice_and_not_overwritten_in_silence(
    long_context: LongContext, tmp_path: Path
) -> None:
    output = tmp_path / "texts"
    sizes = ("--short-documents", "2", "--long-documents", "1", "--json", "-")
    first = run_here("make_needle_corpus.py", "--output", output, *sizes)
    again = run_here("make_needle_corpus.py", "--output", output, *sizes)
    assert json.loads(first.stdout)["reused"] is False and json.loads(again.stdout)["reused"]
    refused = run_here("make_needle_corpus.py", "--output", output, "--seed", "1", *sizes)
    assert refused.returncode == USAGE and "--overwrite" in refused.stderr
    before = (output / "short.jsonl").read_text()
    other = run_here(
        "make_needle_corpus.py", "--output", output, "--seed", "1", *sizes, "--overwrite"
    )
    assert other.returncode == DONE and (output / "short.jsonl").read_text() != before
    for wrong in (
        ("--short-tokens", "2"),
        ("--max-keys", "256"),
        ("--long-max-keys", "128"),
        ("--pair-share", "0"),
    ):
        refused = run_here("make_needle_corpus.py", "--output", tmp_path / "new", *wrong)
        assert refused.returncode == USAGE and wrong[0] in refused.stderr


@pytest.fixture(scope="module")
def last(long_context: LongContext, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of a run on one rank."""
    return long_context.train(tmp_path_factory.mktemp("run") / "run")


def test_ranks_that_share_sequences_train_the_recipe_as_one_does(
    long_context: LongContext, last: Path, tmp_path: Path
) -> None:
    long_context.train(tmp_path / "run", "parallel.sp_size=2", world_size=2)
    alone, shared = (
        {row["step"]: (row["phase"], row["loss"]) for row in curve(run) if row["kind"] == "train"}
        for run in (last.parent.parent, tmp_path / "run")
    )
    assert len(alone) == SHORT_STEPS + LONG_STEPS and set(alone) == set(shared)
    for step, (phase, loss) in alone.items():
        assert shared[step] == (phase, pytest.approx(loss, rel=1e-5)), step


def test_the_recipe_trains_both_phases_and_its_checkpoints_are_asked_for_pairs(
    last: Path,
) -> None:
    short = last.parent / f"step_{SHORT_STEPS}"
    thetas = []
    for checkpoint, length in ((short, SHORT_TOKENS), (last, LONG_TOKENS)):
        recipe = read_recipe(checkpoint)
        assert recipe.train.sequence_length == length
        assert isinstance(recipe.model.position, Rope)
        thetas.append(recipe.model.position.rope_theta)
        done = evaluate(
            *("--checkpoint", checkpoint, "--needle", "--needle-form", "pairs"),
            *("--needle-samples", "2", "--json", "-"),
        )
        assert done.returncode == DONE, done.stderr
        needles = json.loads(done.stdout)["needles"]
        (by_length,) = needles["variants"].values()
        assert list(by_length) == ["16", "32", "64", "128"]
        assert needles["value_tokens"] == 1 and needles["trained_length"] == length
    assert thetas[0] < thetas[1]
