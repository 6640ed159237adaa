"""A real run that starts from weights: the same first loss on every topology, and none of it when
the run resumes.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from pretrain.checkpoint.layout import RECIPE
from pretrain.checkpoint.weights import load_state_dict
from pretrain.core.errors import CheckpointError
from pretrain.train import main
from tests.support.tiny_run import Tiny, curve, own_process, start_ranks
from tools.upcycle import main as upcycle

DENSE = ("model.layer_pattern.kind=all_dense", "model.intermediate_size=32", "model.moe=null")


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in curve(run) if row["kind"] == "train"]


@pytest.fixture(scope="module")
def dense_run(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("dense") / "run"
    with own_process():
        assert main(tiny.arguments(run, *DENSE, steps=8)) == 0
    return run


@pytest.fixture(scope="module")
def dense_goes_on(tiny: Tiny, dense_run: Path) -> list[float]:
    """The losses of a new run from the dense run's weights."""
    with own_process():
        run = dense_run.with_name("on")
        assert (
            main(
                tiny.arguments(
                    run, *DENSE, f"initial_weights={dense_run / 'checkpoints' / 'latest'}", steps=2
                )
            )
            == 0
        )
    return losses(run)


@pytest.mark.parametrize(
    "kind,zero,granularity",
    [("dropless", 3, 2), pytest.param("deepspeed", 2, 1, marks=pytest.mark.full)],
)
def test_an_upcycled_model_trains_on_over_ranks_from_the_dense_models_loss(
    tiny: Tiny,
    dense_run: Path,
    dense_goes_on: list[float],
    tmp_path: Path,
    kind: str,
    zero: int,
    granularity: int,
) -> None:
    out, run = tmp_path / "upcycled", tmp_path / "run"
    options = [
        "--num-experts",
        "4",
        "--top-k",
        "2",
        "--granularity",
        str(granularity),
        "--data",
        str(tiny.data),
    ]
    native = [
        f"--set=model.moe.{field}"
        for field in ("kind=deepspeed", "gate=router", "drop_tokens=false")
    ]
    upcycle(
        [
            "--checkpoint",
            str(dense_run / "checkpoints"),
            "--output",
            str(out),
            *options,
            *(native if kind == "deepspeed" else []),
        ]
    )
    arguments = ["--recipe", out / RECIPE, "--ds_config", tiny.folder / f"zero{zero}.json"]
    for setting in (
        f"initial_weights={out}",
        f"run_path={run}",
        "train.train_tokens=1024",
        "parallel.ep_size=2",
    ):
        arguments += ["--set", setting]
    for rank in start_ranks(arguments, tmp_path):
        assert rank.wait() == 0, rank.stderr
    found = losses(run)
    assert found[0] == pytest.approx(dense_goes_on[0], abs=1e-5)
    assert len(found) == 4 and found[-1] < found[0]
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["layers"]


def test_a_run_from_weights_starts_where_they_are_and_not_at_random(
    dense_run: Path, dense_goes_on: list[float]
) -> None:
    cold = losses(dense_run)
    assert dense_goes_on[0] < cold[-2] < cold[0] - 0.3


@pytest.mark.parametrize(
    "zero,precision,tolerance", [(0, "fp32", 1e-6), (2, "bf16", 3e-3), (3, "fp32", 1e-6)]
)
def test_every_stage_and_precision_starts_from_them(
    tiny: Tiny,
    dense_run: Path,
    dense_goes_on: list[float],
    tmp_path: Path,
    zero: int,
    precision: str,
    tolerance: float,
) -> None:
    weights = f"initial_weights={dense_run / 'checkpoints'}"
    with own_process():
        assert (
            main(
                tiny.arguments(
                    tmp_path / "run",
                    *DENSE,
                    weights,
                    f"train.precision={precision}",
                    steps=2,
                    zero=zero,
                )
            )
            == 0
        )
    assert losses(tmp_path / "run")[0] == pytest.approx(dense_goes_on[0], rel=tolerance)


@pytest.mark.parametrize(
    "moe",
    [
        "{kind: peer, product_key_sizes: [4, 4], num_heads: 2, top_k: 2, query_dim: 8}",
        "{kind: dropless, num_experts: 4, top_k: 2, moe_intermediate_size: 16, bias_balancing: {}}",
    ],
)
def test_every_weight_of_a_mixture_comes_through(tiny: Tiny, tmp_path: Path, moe: str) -> None:
    """A run that hardly learns saves what it started from."""
    first, second, kind = tmp_path / "first", tmp_path / "second", f"model.moe={moe}"
    slowly = ("optimizer.learning_rate=1e-30", "seed=8", f"initial_weights={first / 'checkpoints'}")
    with own_process():
        assert main(tiny.arguments(first, kind, steps=2)) == 0
        assert (
            main(
                tiny.arguments(
                    second,
                    kind,
                    *slowly,
                    "model.moe.bias_balancing.update_rate=1e-30" * ("bias" in moe) or "seed=8",
                    steps=2,
                )
            )
            == 0
        )
    before, after = (load_state_dict(run / "checkpoints" / "step_2") for run in (first, second))
    assert before.keys() == after.keys()
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-8)


def test_a_resumed_run_ignores_them(tiny: Tiny, dense_run: Path, tmp_path: Path) -> None:
    copy, run = tmp_path / "weights", tmp_path / "run"
    shutil.copytree(dense_run / "checkpoints" / "step_8", copy)
    with own_process():
        assert main(tiny.arguments(run, *DENSE, f"initial_weights={copy}", steps=2)) == 0
        shutil.rmtree(copy)
        assert main(tiny.arguments(run, *DENSE, f"initial_weights={copy}", steps=3)) == 0
        assert len(losses(run)) == 3
        with pytest.raises(CheckpointError, match="there is no checkpoint"):
            main(tiny.arguments(tmp_path / "other", *DENSE, f"initial_weights={copy}", steps=3))


def test_what_differs_is_said_at_the_start_of_the_run_and_of_its_plan(
    tiny: Tiny, dense_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = f"initial_weights={dense_run / 'checkpoints'}"
    arguments = tiny.arguments(
        tmp_path / "run", *DENSE, weights, "model.position.rope_theta=5e5", steps=2
    )
    said = "has model.position.rope_theta=10000.0, and the recipe 500000.0"
    with own_process():
        assert main([*arguments, "--dry-run"]) == 0
        assert capsys.readouterr().out.count(said) == 1
        assert main([*arguments, "--dry-run", "--json", "-"]) == 0
        (note,) = json.loads(capsys.readouterr().out)["initial_weights"]
        assert said in note
        assert main(arguments) == 0
    assert capsys.readouterr().err.count(said) == 1
    assert (tmp_path / "run" / "log.txt").read_text().count(said) == 1


@pytest.mark.parametrize(
    "override,named",
    [
        (
            "model.intermediate_size=16",
            r"tensor 'layers\.0\.feed_forward\.down_proj\.weight' is \[32, 32\].*wants \[32, 16\]",
        ),
        ("model.num_hidden_layers=3", r"no tensor 'layers\.2\."),
        ("model.num_hidden_layers=1", r"has a tensor 'layers\.1\."),
        (
            "model.feed_forward={kind: clamped_swiglu}",
            r"model\.feed_forward\.kind=swiglu, and the recipe clamped_swiglu",
        ),
        ("model.position.kind=none", r"model\.position\.kind=rope, and the recipe none"),
        ("model.norm_position=post", r"norm_position=pre, and the recipe post"),
    ],
)
def test_weights_of_another_model_are_refused_by_name(
    tiny: Tiny, dense_run: Path, tmp_path: Path, override: str, named: str
) -> None:
    overrides = (*DENSE, override, f"initial_weights={dense_run / 'checkpoints' / 'latest'}")
    with own_process(), pytest.raises(CheckpointError, match=named):
        main(tiny.arguments(tmp_path / "run", *overrides, steps=2))
