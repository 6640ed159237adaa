"""The loss at several context lengths: the same text at each, and other encodings of positions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from data_pipeline.shards.token_stream import open_split
from pretrain.core.errors import BAD_DATA, DONE, USAGE, ConfigError
from pretrain.evaluation.heldout.lengths import (
    LengthOptions,
    recipe_with_position,
    score_checkpoint_lengths,
)
from pretrain.model.decoder import DecoderLM
from pretrain.model.positions.config import Yarn
from tests.support.tiny_checkpoint import Trained, make_trained
from tests.support.tool_runs import Done, run_here

CPU = torch.device("cpu")
EXACT = 1e-5


def evaluate(*arguments: str | Path) -> Done:
    return run_here("evaluate.py", *arguments)


def heldout(trained: Trained) -> torch.Tensor:
    stream = open_split(trained.manifest, "validation")
    return torch.from_numpy(stream.read(0, stream.num_tokens))


def loss_by_hand(model: DecoderLM, tokens: torch.Tensor, length: int, count: int) -> float:
    """The mean loss over the first ``count`` targets in windows of ``length``, one at a time."""
    nats = 0.0
    for start in range(0, count, length):
        window = tokens[start : start + length + 1]
        with torch.inference_mode():
            log_probs_SV = model.logits(window[None, :-1])[0].double().log_softmax(dim=1)
        nats -= float(log_probs_SV.gather(1, window[1:, None]).sum())
    return nats / count


def test_every_length_scores_the_same_targets_as_plain_windows_do(trained: Trained) -> None:
    # The checkpoint was trained on 32 tokens.
    options = LengthOptions([64, 16, 32])
    result = score_checkpoint_lengths(trained.checkpoint, options, CPU, batch_size=3)
    tokens = heldout(trained)
    sections = (len(tokens) - 1) // 64
    assert (result["sections"], result["section_tokens"]) == (sections, 64)
    assert result["trained_length"] == trained.recipe.train.sequence_length == 32
    scores = result["variants"][trained.recipe.model.position.kind]
    assert list(scores) == ["16", "32", "64"]
    for length, score in scores.items():
        assert score["targets"] == sections * 64
        by_hand = loss_by_hand(trained.model, tokens, int(length), sections * 64)
        assert score["loss"] == pytest.approx(by_hand, rel=EXACT)
        groups = score["by_position"]
        assert sum(group["targets"] for group in groups.values()) == score["targets"]
        mean = sum(group["loss"] * group["targets"] for group in groups.values())
        assert mean / score["targets"] == pytest.approx(score["loss"], rel=EXACT)
    assert list(scores["64"]["by_position"]) == ["0 to 31", "32 to 63"]
    assert list(scores["16"]["by_position"]) == ["0 to 15"]
    # One batch of everything gives the same: sections are not mixed up.
    once = score_checkpoint_lengths(trained.checkpoint, options, CPU, batch_size=10**4)
    for length, score in once["variants"]["rope"].items():
        assert score["loss"] == pytest.approx(scores[length]["loss"], rel=EXACT)
        assert score["standard_error"] == pytest.approx(scores[length]["standard_error"], rel=1e-3)


def test_the_standard_error_is_that_of_the_sections(trained: Trained) -> None:
    options = LengthOptions([32], max_windows=4)
    result = score_checkpoint_lengths(trained.checkpoint, options, CPU)
    score = result["variants"]["rope"]["32"]
    tokens = heldout(trained)
    whole = (len(tokens) - 1) // 32
    losses = torch.tensor(
        [
            loss_by_hand(trained.model, tokens[32 * (number * whole // 4) :], 32, 32)
            for number in range(4)
        ]
    )
    assert score["loss"] == pytest.approx(float(losses.mean()), rel=EXACT)
    assert score["standard_error"] == pytest.approx(float(losses.std() / 2), rel=1e-3)
    alone = score_checkpoint_lengths(trained.checkpoint, LengthOptions([32], max_windows=1), CPU)
    assert alone["variants"]["rope"]["32"]["standard_error"] is None


def test_yarn_is_computed_from_the_same_weights(trained: Trained) -> None:
    """The encoding of the evaluation is really used: it equals a model that was built with it."""
    wanted = "{kind: yarn, factor: 4}"
    options = LengthOptions([64], ["trained", wanted, "yarn"], max_windows=2)
    variants = score_checkpoint_lengths(trained.checkpoint, options, CPU)["variants"]
    yarn = Yarn(
        kind="yarn",
        factor=4.0,
        original_max_position_embeddings=32,
        rope_theta=trained.recipe.model.position.rope_theta,
    )
    assert recipe_with_position(trained.recipe, wanted, 64).model.position == yarn
    # Left out, the factor is that of the lengths: 64 / 32.
    shortest = recipe_with_position(trained.recipe, "yarn", 64).model.position
    assert isinstance(shortest, Yarn) and shortest.factor == 2.0
    model = DecoderLM(trained.recipe.model.model_copy(update={"position": yarn})).eval()
    model.load_state_dict(trained.model.state_dict())
    tokens = heldout(trained)
    whole = (len(tokens) - 1) // 64
    second = 64 * (whole // 2)
    by_hand = (
        loss_by_hand(model, tokens, 64, 64) + loss_by_hand(model, tokens[second:], 64, 64)
    ) / 2
    assert variants[wanted]["64"]["loss"] == pytest.approx(by_hand, rel=EXACT)
    losses = {scores["64"]["loss"] for scores in variants.values()}
    assert len(losses) == 3


def test_lengths_beyond_the_recipes_positions_are_for_encodings_without_a_table(
    trained: Trained,
) -> None:
    longest = trained.recipe.model.max_position_embeddings
    recipe = recipe_with_position(trained.recipe, "trained", 4 * longest)
    assert recipe.model.max_position_embeddings == 4 * longest
    # The recipe is the checkpoint's otherwise.
    unchanged = recipe_with_position(trained.recipe, "trained", 8)
    assert unchanged == trained.recipe


@pytest.mark.parametrize("kind", ["learned", "alibi", "rope_alibi"])
def test_a_table_of_positions_ends_and_other_encodings_do_not(kind: str, tmp_path: Path) -> None:
    trained = make_trained(
        tmp_path, (f"model.position={{kind: {kind}}}", "model.max_position_embeddings=32")
    )
    done = evaluate("--checkpoint", trained.latest, "--lengths", "32", "64", "--json", "-")
    if kind == "learned":
        assert done.returncode == USAGE
        assert "a learned vector for each of its 32 positions, none for later ones" in done.stderr
        return
    assert done.returncode == DONE, done.stderr
    assert set(json.loads(done.stdout)["lengths"]["variants"][kind]) == {"32", "64"}
    # ALiBi's weights know no rotation.
    refused = evaluate("--checkpoint", trained.latest, "--lengths", "32", "--positions", "yarn")
    assert refused.returncode == USAGE
    assert "another family of encodings" in refused.stderr and "Traceback" not in refused.stderr


def test_the_command_writes_a_table_json_and_a_plot(trained: Trained, tmp_path: Path) -> None:
    plot, path = tmp_path / "plot.png", tmp_path / "result.json"
    done = evaluate(
        *("--checkpoint", trained.latest, "--lengths", "32", "64", "--positions", "trained"),
        *("yarn", "--max-windows", "3", "--plot", plot, "--json", path),
    )
    assert done.returncode == DONE, done.stderr
    assert "## Context lengths, on 3 sections of 64 tokens" in done.stdout
    assert "\n| yarn | 64 | " in done.stdout and "\n| 32 to 63 | " in done.stdout
    # Held-out text is scored whole only if it is asked for.
    result = json.loads(path.read_text())
    assert "loss" not in result and set(result["lengths"]["variants"]) == {"rope", "yarn"}
    assert plot.read_bytes().startswith(b"\x89PNG")
    both = evaluate("--checkpoint", trained.latest, "--lengths", "32", "--heldout", "--no-bigram")
    assert both.returncode == DONE and "| targets |" in both.stdout


@pytest.mark.parametrize(
    "options,code,said",
    [
        (("--lengths", "0"), USAGE, "--lengths has 0"),
        (("--lengths", "1000000"), BAD_DATA, "one window of 1000000 needs 1000001"),
        (("--lengths", "32", "--positions", "yearn"), USAGE, "yearn"),
        (("--lengths", "32", "--positions", "[1]"), USAGE, "give a kind, or a mapping"),
        (("--lengths", "32", "--positions", "{kind: yarn, factr: 2}"), USAGE, "factr"),
        (("--plot", "x.png"), USAGE, "--plot belongs to --lengths"),
        (("--positions", "yarn"), USAGE, "--positions belongs to --lengths"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_sentence(
    options: tuple[str, ...], code: int, said: str, trained: Trained
) -> None:
    refused = evaluate("--checkpoint", trained.latest, *options)
    assert refused.returncode == code, refused.stderr
    assert said in refused.stderr and "Traceback" not in refused.stderr


def test_a_document_mask_counts_positions_in_documents(tmp_path: Path) -> None:
    trained = make_trained(tmp_path, ("data.document_mask=true",))
    result = score_checkpoint_lengths(trained.checkpoint, LengthOptions([256]), CPU)
    assert result["document_mask"]
    # Documents begin inside of windows too, each with position 0.
    groups = result["variants"]["rope"]["256"]["by_position"]
    windows = result["sections"]
    assert groups["0 to 31"]["targets"] > windows * 32


def test_a_position_that_is_no_other_is_the_trained_one(trained: Trained) -> None:
    with pytest.raises(ConfigError, match="another family"):
        recipe_with_position(trained.recipe, "none", 64)
