from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pretrain.checkpoint.layout import MANIFEST, damage, read_recipe, read_state, resolve_checkpoint
from pretrain.checkpoint.tensor_headers import RANGES
from pretrain.checkpoint.validate import open_whole_weights
from pretrain.checkpoint.weights import WEIGHTS, file_of, load_model, load_state_dict
from pretrain.checkpoint.weights_only import tensor_shapes, write_weights_folder
from pretrain.config.load import load_recipe
from pretrain.config.recipe import Recipe
from pretrain.core.errors import CheckpointError, ConfigError
from pretrain.model.decoder import DecoderLM
from tests.support.checkpoint_variants import split_weights

NATIVE = ("model.moe.kind=deepspeed", "model.moe.drop_tokens=false")
ONE, FIRST, SECOND = file_of(WEIGHTS, 0, 1), file_of(WEIGHTS, 0, 2), file_of(WEIGHTS, 1, 2)
W1, DENSE = "layers.1.feed_forward.experts.w1", "final_norm.weight"
EXPERT_2 = "layers.1.feed_forward.deepspeed_moe.experts.deepspeed_experts.2.up_proj.weight"


def recipe_with(*overrides: str) -> Recipe:
    return load_recipe("debug", ["model.vocab_size=300", *overrides])


def weights_of(recipe: Recipe) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = DecoderLM(recipe.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.1)
    tied = {"head.weight"} if recipe.model.tie_word_embeddings else set()
    return {
        name: tensor.detach() for name, tensor in model.state_dict().items() if name not in tied
    }


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        NATIVE,
        ("model.tie_word_embeddings=true", "model.moe.bias_balancing={}"),
        ("model.layer_pattern.kind=all_dense", "model.intermediate_size=48"),
        ("model.moe={kind: peer, product_key_sizes: [4, 4], query_dim: 8}",),
        (
            "model.feed_forward.bias=true",
            "model.moe.num_shared_experts=1",
            "model.embedding_size=16",
        ),
    ],
)
def test_a_folder_of_weights_is_a_checkpoint_like_any_other(
    overrides: tuple[str, ...], tmp_path: Path
) -> None:
    recipe = recipe_with(*overrides)
    weights = weights_of(recipe)
    (tmp_path / "t.json").write_text("{}")
    write_weights_folder(
        tmp_path / "out", recipe, reversed(weights.items()), tmp_path / "t.json", step=7
    )
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    folder = resolve_checkpoint(tmp_path / "out")
    assert (
        damage(folder) is None and read_recipe(folder) == recipe and read_state(folder)["step"] == 7
    )
    found = load_state_dict(folder)
    assert found.keys() == weights.keys() and all(
        torch.equal(found[name], weights[name]) for name in weights
    )
    dense, experts = tensor_shapes(recipe.model)
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == dense | experts
    open_whole_weights(folder, recipe.model)
    load_model(folder)


def test_other_precisions_are_written_in_fp32(tmp_path: Path) -> None:
    recipe = recipe_with()
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in weights_of(recipe).items()}
    write_weights_folder(tmp_path / "out", recipe, weights.items(), None)
    assert all(
        torch.equal(tensor, weights[name].float())
        for name, tensor in load_state_dict(tmp_path / "out").items()
    )


@pytest.mark.parametrize(
    "change,words",
    [
        (lambda weights: weights.pop(W1), f"'{W1}' is missing"),
        (lambda weights: weights.update(extra=torch.zeros(1)), "no tensor 'extra'"),
        (
            lambda weights: weights.update({W1: torch.zeros(3, 32, 32)}),
            r"\[3, 32, 32\], and should be torch.float32 \[4, 32, 32\]",
        ),
    ],
)
def test_weights_that_do_not_fit_leave_nothing_behind(
    change: Callable[[dict[str, torch.Tensor]], object], words: str, tmp_path: Path
) -> None:
    recipe = recipe_with()
    weights = weights_of(recipe)
    change(weights)
    with pytest.raises(CheckpointError, match=words):
        write_weights_folder(tmp_path / "out", recipe, weights.items(), None)
    assert list(tmp_path.iterdir()) == []


def test_a_full_folder_and_an_unknown_vocabulary_are_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="not empty"):
        write_weights_folder(tmp_path, recipe_with(), [], None)
    with pytest.raises(ConfigError, match="vocab_size"):
        write_weights_folder(tmp_path / "out", load_recipe("debug"), [], None)


# --- what is missing, doubled or cut off is named -------------------------------------------------


def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def without_second_file(folder: Path) -> None:
    split_weights(folder, 2)
    (folder / SECOND).unlink()


def with_a_file_of_one_rank(folder: Path) -> None:
    shutil.copyfile(folder / ONE, folder / "kept")
    split_weights(folder, 2)
    (folder / "kept").rename(folder / ONE)


def with_ranges(path: Path, change: Callable[[dict[str, list[Any]]], object]) -> None:
    """Rewrites the ranges in a file's header."""
    with safe_open(path, framework="pt") as file:
        strings = file.metadata()
    ranges = json.loads(strings[RANGES])
    change(ranges)
    save_file(load_file(path), path, strings | {RANGES: json.dumps(ranges)})


def with_a_short_share(folder: Path) -> None:
    split_weights(folder, 2)
    with safe_open(folder / SECOND, framework="pt") as file:
        strings = file.metadata()
    tensors = load_file(folder / SECOND)
    tensors[W1] = tensors[W1][:-1].clone()
    save_file(tensors, folder / SECOND, strings)


def with_an_overlap(folder: Path) -> None:
    split_weights(folder, 2)
    with_ranges(folder / SECOND, lambda ranges: ranges[W1].__setitem__(0, 1))


def with_other_shapes(folder: Path) -> None:
    split_weights(folder, 2)
    with_ranges(folder / SECOND, lambda ranges: ranges[W1].__setitem__(1, [8, 16, 32]))


def with_nonsense(folder: Path) -> None:
    split_weights(folder, 2)
    with_ranges(folder / SECOND, lambda ranges: ranges.update({W1: "everywhere"}))


def cut(folder: Path) -> None:
    (folder / ONE).write_bytes((folder / ONE).read_bytes()[:-100])


BROKEN: dict[str, tuple[tuple[str, ...], Callable[[Path], object], str]] = {
    "a rank's file is missing": (
        (),
        without_second_file,
        "1 of 2 weights files, weights-00001-of-00002.safetensors is missing",
    ),
    "all files are missing": (
        (),
        lambda folder: (folder / ONE).unlink(),
        "0 of 1 weights files, weights-00000-of-00001.safetensors is missing",
    ),
    "a file of another topology lies beside": (
        (),
        with_a_file_of_one_rank,
        "weights files of 1 and of 2 ranks .weights-00000-of-00001",
    ),
    "a share is short": (
        (),
        with_a_short_share,
        (
            f"'{W1}' has 4095 of 4096 elements .2048 in weights-00000-of-00002.safetensors, 2047 "
            "in weights-00001"
        ),
    ),
    "two shares overlap": (
        (),
        with_an_overlap,
        f"elements of the tensor '{W1}' are more than once in weights-00000-of-00002",
    ),
    "two shares are of different tensors": (
        (),
        with_other_shapes,
        rf"'{W1}' in .* is torch.float32 \[8, 16, 32\], and in weights-00000-of-00002",
    ),
    "a header says nonsense": ((), with_nonsense, "has ranges that are none"),
    "a file is cut off": ((), cut, "weights-00000-of-00001.safetensors cannot be read"),
    "an expert is missing": (
        NATIVE,
        lambda folder: edit(folder / ONE, lambda tensors: tensors.pop(EXPERT_2)),
        f"'{EXPERT_2}' is missing",
    ),
    "an expert has other rows": (
        NATIVE,
        lambda folder: edit(
            folder / ONE,
            lambda tensors: tensors.update({EXPERT_2: tensors[EXPERT_2][:-1].clone()}),
        ),
        rf"'{EXPERT_2}' in .* is \[31, 32\] instead of \[32, 32\]",
    ),
    "a dense tensor is missing": (
        (),
        lambda folder: edit(folder / ONE, lambda tensors: tensors.pop(DENSE)),
        f"'{DENSE}' is missing",
    ),
    "a tensor is unknown": (
        (),
        lambda folder: edit(folder / ONE, lambda tensors: tensors.update(extra=torch.zeros(1))),
        "do not fit its recipe, which has no 'extra'",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_with_the_weights_is_named(case: str, tmp_path: Path) -> None:
    overrides, damage_it, words = BROKEN[case]
    recipe = recipe_with(*overrides)
    write_weights_folder(tmp_path / "out", recipe, weights_of(recipe).items(), None)
    open_whole_weights(tmp_path / "out", recipe.model)
    damage_it(tmp_path / "out")
    with pytest.raises(CheckpointError, match=words):
        open_whole_weights(tmp_path / "out", recipe.model)


def test_shares_of_two_ranks_are_whole(tmp_path: Path) -> None:
    recipe = recipe_with()
    weights = weights_of(recipe)
    write_weights_folder(tmp_path / "out", recipe, weights.items(), None)
    split_weights(tmp_path / "out", 2)
    found = open_whole_weights(tmp_path / "out", recipe.model)
    assert all(torch.equal(found.read(name), tensor) for name, tensor in weights.items())
    assert torch.equal(found.read(W1, 2), weights[W1][2])


def test_the_manifest_notices_a_changed_file(tmp_path: Path) -> None:
    recipe = recipe_with()
    write_weights_folder(tmp_path / "out", recipe, weights_of(recipe).items(), None)
    edit(tmp_path / "out" / ONE, lambda tensors: tensors[DENSE].mul_(2))
    assert (damage(tmp_path / "out") or "").startswith(ONE)
    (tmp_path / "out" / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        resolve_checkpoint(tmp_path / "out")
