"""Settings of ZeRO that the rules allow for a kind of MoE layer change no result of a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import Case, Results, run_cases
from tests.support.training_cases import case, difference

SECONDARY = {"zero_hpz_partition_size": 2}


def with_setting(kind: str, stage: int, **zero: Any) -> Case:
    one = case(kind, stage, 1)
    shown = ", ".join(f"{key}={value}" for key, value in zero.items())
    return one | {"name": f"{one['name']}/{shown}", "zero_optimization": zero}


TWO = [
    with_setting("peer", 3, **SECONDARY),
    with_setting("peer", 2, contiguous_gradients=False),
    with_setting("peer", 1, reduce_scatter=False),
    with_setting("dropless", 1, contiguous_gradients=False),
]
# Gradients summed in bf16 are rounded: this has to show, and little.
ROUNDED = with_setting("dropless", 1) | {
    "name": "rounded",
    "sections": {"communication_data_type": "bf16"},
}


def references(folder: Path) -> Results:
    return run_cases(
        "training_steps", [case(kind, 0, 1) for kind in ("peer", "dropless")], 1, folder
    )


def test_settings_change_no_loss_on_two_ranks(tmp_path: Path) -> None:
    plain = references(tmp_path / "one")
    found = run_cases("training_steps", [*TWO, ROUNDED], 2, tmp_path / "two")
    for entry in TWO:
        reference = plain[f"{entry['label']}/zero0/ep1"]
        assert difference(found[entry["name"]], reference) <= 1e-6, entry["name"]
    rounded = difference(found["rounded"], plain["dropless-sgd/zero0/ep1"])
    assert 1e-6 < rounded < 1e-3


@pytest.mark.full
def test_a_second_partition_of_half_the_ranks_changes_no_loss(tmp_path: Path) -> None:
    entry = with_setting("peer", 3, **SECONDARY)
    found = run_cases("training_steps", [entry], 4, tmp_path / "four")
    plain = references(tmp_path / "one")[f"{entry['label']}/zero0/ep1"]
    assert difference(found[entry["name"]], plain) <= 1e-6
