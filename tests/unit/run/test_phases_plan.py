"""--dry-run of recipes with phases: a table of them, and what can be refused before there is a
model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pretrain.callbacks.progress import ProgressBar
from pretrain.config.load import load_recipe
from pretrain.config.rules.sections import check_topology
from pretrain.config.timeline import Timeline
from pretrain.core.errors import ConfigError
from pretrain.run.same_run import past_difference
from pretrain.train import main


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)  # no data there: the tokenizer's section says the vocabulary's size

    def make(recipe: str, *overrides: str) -> dict[str, Any]:
        settings = [
            part for setting in ("train.precision=fp32", *overrides) for part in ("--set", setting)
        ]
        assert (
            main(
                [
                    "--recipe",
                    recipe,
                    "--dry-run",
                    "--world-size",
                    "2",
                    "--json",
                    str(tmp_path / "plan.json"),
                    *settings,
                ]
            )
            == 0
        )
        return dict(json.loads((tmp_path / "plan.json").read_text()))

    return make


def test_a_phase_of_long_sequences_is_planned_with_its_own_sizes(
    plan: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    found = plan("quickstart_long", "phases.1.frozen=[router, layers.0.*]")
    short, long = found["phases"]
    assert (
        short["steps"],
        short["global_batch_size"],
        short["sequence_length"],
        short["gradient_accumulation_steps"],
    ) == (304, 8, 256, 1)
    assert (
        long["steps"],
        long["global_batch_size"],
        long["sequence_length"],
        long["gradient_accumulation_steps"],
    ) == (76, 2, 1024, 1)
    assert (short["position"]["rope_theta"], long["position"]["rope_theta"]) == (10000, 100000)
    assert (short["last_learning_rate"], long["first_learning_rate"]) == (2e-3, 2e-3) and long[
        "last_learning_rate"
    ] < 1e-4
    assert (short["frozen"], long["frozen"]) == ([], ["router", "layers.0.*"])
    assert (
        found["steps"] == 380
        and found["train_tokens"] == short["tokens"] + long["tokens"] == 778240
    )
    shown = capsys.readouterr().out
    assert "phases" in shown and "short" in shown and "long" in shown


def test_a_plain_run_has_no_phases(plan: Any) -> None:
    assert plan("quickstart_wsd")["phases"] == []


def test_the_shipped_branch_starts_at_a_checkpoint_that_its_trunk_keeps() -> None:
    trunk, branch = load_recipe("quickstart_wsd"), load_recipe("quickstart_wsd_decay")
    start, decay = Timeline(branch).phases
    step = int((branch.branch_from or "").rpartition("step_")[2])
    assert branch.branch_from == f"{trunk.output_path}/checkpoints/step_{step}"
    assert (
        step == start.num_steps
        and step % trunk.checkpoint.interval_steps == 0
        and step < Timeline(trunk).num_steps
    )
    assert trunk.checkpoint.keep_last * trunk.checkpoint.interval_steps >= Timeline(trunk).num_steps
    assert (
        decay.num_steps == Timeline(trunk).num_steps - step
        and past_difference(branch, trunk, step) is None
    )
    assert past_difference(branch, trunk, step + 1) is not None


def test_what_a_phase_freezes_is_looked_up_before_anything_starts(plan: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"phases\.long\.frozen names 'shared_experts'.*no parameter"
    ):
        plan("quickstart_long", "phases.1.frozen=[shared_experts]")


def test_every_phase_has_to_fit_the_ranks() -> None:
    assert check_topology(load_recipe("quickstart_long"), 2, zero_stage=1) == 1
    with pytest.raises(ConfigError, match=r"phases\.long: train\.global_batch_size \(2\).*2 x 2"):
        check_topology(
            load_recipe("quickstart_long", ["phases.1.micro_batch_size=2"]), 2, zero_stage=1
        )


def test_the_progress_bar_names_the_phase() -> None:
    bar = ProgressBar()
    bar.on_start(0, 2)
    bar.on_record(
        {
            "kind": "train",
            "step": 1,
            "loss": 1.0,
            "tokens_per_second": 1.0,
            "phase": "warm",
            "phase_number": 1,
        }
    )
    assert bar.shown["phase"] == "warm"
    bar.on_end({})
