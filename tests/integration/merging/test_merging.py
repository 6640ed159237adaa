"""tools/merge_checkpoints.py: means of checkpoints, joined shards, mixtures of dense models."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.checkpoint import layout
from pretrain.checkpoint.experts import read_experts
from pretrain.checkpoint.weights import load_model, load_state_dict
from pretrain.checkpoint.weights_only import tensor_shapes, write_weights_folder
from pretrain.config.load import load_recipe
from pretrain.core.errors import BAD_CHECKPOINT, DONE, USAGE, CheckpointError, ConfigError
from pretrain.export.writer import open_exported_weights
from pretrain.merging.blend import decay_rates, uniform_rates, weighted_rates
from tests.support.checkpoint_variants import over_ranks, shaken, variant
from tests.support.fork_server import run_python
from tests.support.paths import TOOLS
from tests.support.tiny_checkpoint import STEPS, Trained, make_trained, seal
from tools.merge_checkpoints import main

TOOL = TOOLS / "merge_checkpoints.py"


def written_weights(folder: Path) -> dict[str, torch.Tensor]:
    reader = open_exported_weights(folder)
    return {name: reader.read(name) for name in reader.names}


@pytest.fixture(scope="module")
def run(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with four checkpoints, of which the two newest come from two ranks."""
    checkpoints = tmp_path_factory.mktemp("run") / "checkpoints"
    for step in (2, 9, 10, 100):
        folder = variant(trained, checkpoints / f"step_{step}", shaken(step), step=step)
        if step > 9:
            over_ranks(folder, 2)
    layout.write_pointer(checkpoints, "step_100")
    return checkpoints.parent


def merge(*arguments: str | Path, output: Path) -> dict[str, Any]:
    report = output.with_name(output.name + ".json")
    main([*map(str, arguments), "--output", str(output), "--json", str(report)])
    result: dict[str, Any] = json.loads(report.read_text())
    return result


def folders(run: Path) -> list[Path]:
    return [run / "checkpoints" / f"step_{step}" for step in (2, 9, 10, 100)]


def expected_mean(run: Path, shares: list[float]) -> dict[str, Tensor]:
    states = [load_state_dict(folder) for folder in folders(run)]
    return {
        name: sum(share * state[name].double() for share, state in zip(shares, states, strict=True))
        for name in states[0]
    }


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.double(), expected[name].double(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "arguments,shares",
    [
        (("average", "--last", "3"), [0.0, 1 / 3, 1 / 3, 1 / 3]),
        (("average",), [0.25] * 4),
        (("ema", "--decay", "0.5"), [0.125, 0.125, 0.25, 0.5]),
        (("ema", "--decay", "0"), [0.0, 0.0, 0.0, 1.0]),
    ],
)
def test_a_runs_checkpoints_are_averaged_oldest_first_whatever_ranks_wrote_them(
    run: Path, tmp_path: Path, arguments: tuple[str, ...], shares: list[float]
) -> None:
    job, *options = arguments
    result = merge(job, "--run", run, *options, "--max-windows", "8", output=tmp_path / "out")
    assert_close(load_state_dict(tmp_path / "out"), expected_mean(run, shares))
    used = [
        folder for folder, share in zip(folders(run), shares, strict=True) if share or job == "ema"
    ]
    assert list(result["losses_before"]) == [str(folder) for folder in used]
    assert result["loss_after"] < 8 and layout.read_state(tmp_path / "out")["step"] == 100


def test_a_soup_has_the_given_weights_divided_by_their_sum(run: Path, tmp_path: Path) -> None:
    merge(
        "soup",
        "--checkpoints",
        *folders(run),
        "--weights",
        "0",
        "1",
        "0",
        "3",
        "--no-score",
        output=tmp_path / "out",
    )
    assert_close(load_state_dict(tmp_path / "out"), expected_mean(run, [0, 0.25, 0, 0.75]))
    swapped = expected_mean(run, [0, 0.75, 0, 0.25])
    with pytest.raises(AssertionError):
        assert_close(load_state_dict(tmp_path / "out"), swapped)


@pytest.mark.parametrize(
    "rates", [uniform_rates(3), weighted_rates([0.3, 0.5, 0.7]), decay_rates(3, 0.9)]
)
def test_equal_checkpoints_stay_as_they_are_bit_for_bit(
    trained: Trained, rates: list[float]
) -> None:
    from pretrain.merging.blend import blended

    state = load_state_dict(trained.checkpoint)
    assert all(torch.equal(blended([state] * 3, rates, name), state[name]) for name in state)


def test_noise_averages_out(trained: Trained, tmp_path: Path) -> None:
    """Means of several noisy copies are nearer to the model without noise, and so is their loss."""
    copies = [
        variant(trained, tmp_path / f"copy{seed}", shaken(seed, size=0.05)) for seed in range(4)
    ]
    result = merge(
        "average", "--checkpoints", *copies, "--max-windows", "16", output=tmp_path / "out"
    )
    assert result["loss_after"] < min(result["losses_before"].values()) - 0.02


def test_the_result_is_a_checkpoint_to_evaluate_and_to_train_on_from(
    trained: Trained, run: Path, tmp_path: Path
) -> None:
    merge("average", "--run", run, "--no-score", output=tmp_path / "out")
    assert layout.damage(tmp_path / "out") is None
    model, recipe = load_model(tmp_path / "out")
    assert model.config == trained.recipe.model.model_copy(
        update={"attention": model.config.attention}
    )
    assert (
        recipe.name == "debug-average"
        and recipe.run_path is None
        and recipe.data_path == trained.recipe.data_path
    )


@pytest.mark.parametrize("limit,files", [(None, 1), ("50KB", 5)])
def test_shards_of_all_ranks_are_joined_bit_for_bit(
    run: Path, tmp_path: Path, limit: str | None, files: int
) -> None:
    options = ["--max-shard-size", limit] if limit else []
    result = merge(
        "shards", "--checkpoint", run / "checkpoints" / "step_10", *options, output=tmp_path / "out"
    )
    written, expected = (
        written_weights(tmp_path / "out"),
        load_state_dict(run / "checkpoints" / "step_10"),
    )
    assert written.keys() == expected.keys() and all(
        torch.equal(written[name], expected[name]) for name in expected
    )
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == files and result[
        "tensors"
    ] == len(expected)
    assert (tmp_path / "out" / layout.RECIPE).is_file()


def test_shards_may_be_written_in_half_precision(run: Path, tmp_path: Path) -> None:
    merge(
        "shards",
        "--checkpoint",
        run / "checkpoints",
        "--dtype",
        "bfloat16",
        output=tmp_path / "out",
    )
    written, expected = (
        written_weights(tmp_path / "out"),
        load_state_dict(run / "checkpoints" / "step_100"),
    )
    assert all(torch.equal(written[name], expected[name].bfloat16()) for name in expected)


@pytest.fixture(scope="module")
def branches(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A dense model with biases and a noisy copy of it."""
    overrides = (
        "model.layer_pattern.kind=all_dense",
        "model.intermediate_size=32",
        "model.feed_forward.bias=true",
    )
    dense = make_trained(tmp_path_factory.mktemp("dense"), overrides)
    return [
        dense.checkpoint,
        variant(dense, tmp_path_factory.mktemp("copy") / "weights", shaken(1, size=0.05)),
    ]


def test_dense_models_become_the_experts_of_a_mixture(branches: list[Path], tmp_path: Path) -> None:
    pattern = "model.layer_pattern={kind: every_nth, n: 2}"
    result = merge(
        "experts",
        "--checkpoints",
        *branches,
        "--set",
        pattern,
        "--set",
        "model.moe.num_experts=4",
        output=tmp_path / "out",
    )
    states, mixed = (
        [load_state_dict(branch) for branch in branches],
        load_state_dict(tmp_path / "out"),
    )
    recipe = layout.read_recipe(tmp_path / "out")
    assert recipe.model.moe_layers == [1] and recipe.name == "debug-mixed"
    for number, expert in enumerate(read_experts(mixed, "layers.1.feed_forward", recipe.model)):
        for name in recipe.model.feed_forward.parameter_names:
            assert torch.equal(expert[name], states[number % 2][f"layers.1.feed_forward.{name}"])
    shared = [name for name in mixed if not name.startswith("layers.1.feed_forward.")]
    assert "layers.0.feed_forward.up_proj.weight" in shared
    for name in shared:
        torch.testing.assert_close(mixed[name], (states[0][name] + states[1][name]) / 2)
    assert result["loss_after"] < max(result["losses_before"].values())


@pytest.mark.parametrize("native", [pytest.param(False, marks=pytest.mark.full), True])
def test_a_mixture_of_equal_models_is_that_model(
    branches: list[Path], tmp_path: Path, native: bool
) -> None:
    overrides = (
        [
            "--set=model.moe.kind=deepspeed",
            "--set=model.moe.drop_tokens=false",
            "--set=model.moe.use_residual=true",
        ]
        if native
        else []
    )
    result = merge(
        "experts", "--checkpoints", branches[0], branches[0], *overrides, output=tmp_path / "out"
    )
    assert result["loss_after"] == pytest.approx(
        result["losses_before"][str(branches[0])], abs=1e-5
    )


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return run_python(TOOL, *arguments)


def test_the_command_prints_the_losses_and_never_overwrites(run: Path, tmp_path: Path) -> None:
    arguments = (
        "average",
        "--run",
        run,
        "--last",
        "2",
        "--max-windows",
        "8",
        "--output",
        tmp_path / "out",
    )
    done = command(*arguments)
    assert done.returncode == DONE, done.stderr
    assert "held-out loss" in done.stdout and "result" in done.stdout and "step_10 " in done.stdout
    before = (tmp_path / "out" / layout.MANIFEST).read_text()
    refused = command(*arguments)
    assert (
        refused.returncode == USAGE
        and "is not empty" in refused.stderr
        and "Traceback" not in refused.stderr
    )
    assert (tmp_path / "out" / layout.MANIFEST).read_text() == before and len(
        list(tmp_path.iterdir())
    ) == 1


def test_bad_input_is_refused_in_a_sentence(
    trained: Trained, branches: list[Path], run: Path, tmp_path: Path
) -> None:
    out, first, second = tmp_path / "out", *folders(run)[:2]
    torn = variant(trained, tmp_path / "torn")
    elsewhere = variant(trained, tmp_path / "elsewhere", None, f"data.path={tmp_path}")
    stranger = shutil.copytree(first, tmp_path / "stranger")
    state = layout.read_state(first) | {"tokenizer_sha256": "0" * 64}
    (stranger / layout.STATE).write_text(json.dumps(state))
    seal(stranger)
    with (torn / "weights-00000-of-00001.safetensors").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\0")
    cases: list[tuple[type[Exception], str, list[object]]] = [
        (ConfigError, "give either --checkpoints or --run", ["average"]),
        (ConfigError, "has 4 complete checkpoints", ["average", "--run", run, "--last", "5"]),
        (
            ConfigError,
            "2 checkpoints and 1 weights",
            ["soup", "--checkpoints", first, second, "--weights", "1"],
        ),
        (
            ConfigError,
            "numbers from 0 up",
            ["soup", "--checkpoints", first, second, "--weights", "2", "-1"],
        ),
        (ConfigError, "--decay is 1", ["ema", "--run", run, "--decay", "1"]),
        (
            ConfigError,
            "'5 apples' is no size",
            ["shards", "--checkpoint", first, "--max-shard-size", "5 apples"],
        ),
        (ConfigError, "one model makes no mixture", ["experts", "--checkpoints", branches[0]]),
        (
            ConfigError,
            "cannot share 3 experts",
            ["experts", "--checkpoints", *branches, "--set", "model.moe.num_experts=3"],
        ),
        (
            CheckpointError,
            "mixture of experts already",
            ["experts", "--checkpoints", first, second],
        ),
        (CheckpointError, "another tokenizer", ["average", "--checkpoints", first, stranger]),
        (CheckpointError, "is damaged", ["average", "--checkpoints", first, torn]),
        (ConfigError, "trained on different data", ["average", "--checkpoints", first, elsewhere]),
        (
            CheckpointError,
            r"model\.feed_forward\.bias \(false and true\)",
            ["average", "--checkpoints", first, variant_with_biases(trained, tmp_path)],
        ),
    ]
    for error, sentence, arguments in cases:
        with pytest.raises(error, match=sentence):
            main([*map(str, arguments), "--output", str(out)])
        assert not out.exists()
    assert not list(tmp_path.glob(".out*"))


def variant_with_biases(trained: Trained, folder: Path) -> Path:
    def edit(tensors: dict[str, Tensor]) -> None:
        dense, _ = tensor_shapes(biased)
        tensors |= {
            name: torch.zeros(shape) for name, shape in dense.items() if name not in tensors
        }

    biased = trained.recipe.model.model_copy(
        update={"feed_forward": trained.recipe.model.feed_forward.model_copy(update={"bias": True})}
    )
    return variant(trained, folder / "biased", edit, "model.feed_forward.bias=true")


def test_a_damaged_checkpoint_has_its_exit_code(run: Path, tmp_path: Path) -> None:
    refused = command(
        "average", "--checkpoints", run / "checkpoints" / "step_3", "--output", tmp_path / "out"
    )
    assert refused.returncode == BAD_CHECKPOINT and "there is no checkpoint" in refused.stderr


@pytest.mark.full
@pytest.mark.parametrize("job", ["average", "soup", "ema", "shards"])
def test_memory_holds_two_tensors_and_not_the_model(tmp_path: Path, job: str) -> None:
    """1 GB of weights in tensors of at most 32 MiB: peak below 2 x 32 MiB + 500 MB."""
    sizes = [
        "model.vocab_size=8192",
        "model.hidden_size=1024",
        "model.num_hidden_layers=16",
        "model.moe.moe_intermediate_size=2048",
    ]
    recipe = load_recipe("debug", [*sizes, "model.moe.num_experts=2", "model.moe.top_k=1"])
    dense, experts = tensor_shapes(recipe.model)
    (tmp_path / "tokenizer.json").write_text("{}")
    shapes = dense | experts
    assert (
        max(torch.Size(shape).numel() for shape in shapes.values()) * 4 == 2**25
        and sum(torch.Size(s).numel() for s in shapes.values()) * 4 > 8e8
    )
    tensors = ((name, torch.full(shape, 0.5)) for name, shape in shapes.items())
    write_weights_folder(tmp_path / "model", recipe, tensors, tmp_path / "tokenizer.json", STEPS)
    one = (
        ["--checkpoint", tmp_path / "model"]
        if job == "shards"
        else ["--checkpoints", *[tmp_path / "model"] * 3, "--no-score"]
    )
    extra = {"soup": ["--weights", "1", "2", "3"], "ema": ["--decay", "0.5"]}.get(job, [])
    process = subprocess.Popen(
        [sys.executable, str(TOOL), job, *map(str, [*one, *extra, "--output", tmp_path / "out"])],
        stderr=subprocess.PIPE,
    )
    _, status, usage = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == DONE
    assert usage.ru_maxrss * 1024 < 2 * 2**25 + 500e6
