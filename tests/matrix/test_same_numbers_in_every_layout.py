"""Loss and gradient norm are the same for every number of ranks, ep_size, ZeRO stage and optimizer.

A selection that spans them runs in tests/integration.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.ranks import Case, run_cases
from tests.support.training_cases import ADAMW, MUON, SGD, case, check_all

OTHER_LAYOUTS_OF_MUON = {
    1: (
        [case(kind, 0, 1, MUON) for kind in ("dropless", "deepspeed", "peer")]
        + [case("dropless", 3, 1, MUON)]
    ),
    2: [
        case("dropless", 0, 2, MUON),
        case("dropless", 3, 1, MUON),
        case("deepspeed", 2, 2, MUON),
        case("peer", 3, 2, MUON),
    ],
    4: [
        case("dropless", 1, 2, MUON),
        case("dropless", 2, 4, MUON),
        case("dropless", 3, 1, MUON),
        case("peer", 2, 2, MUON),
    ],
}


def whole_matrix(world_size: int) -> list[Case]:
    return [
        case(kind, zero, ep_size, optimizer, **extra)
        for kind in ("dropless", "deepspeed", "peer")
        for zero in (0, 1, 2, 3)
        for ep_size in (1, 2, 4)
        for optimizer in (SGD, ADAMW)
        for extra in ({}, {"expert_gain": 10.0})
        if world_size % ep_size == 0 and not (kind == "deepspeed" and zero == 3)
    ]


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_muon_agrees_for_every_kind_of_layer_and_on_four_ranks(tmp_path: Path) -> None:
    matrix = {
        world_size: run_cases("training_steps", cases, world_size, tmp_path / f"ranks{world_size}")
        for world_size, cases in OTHER_LAYOUTS_OF_MUON.items()
    }
    assert check_all(matrix, OTHER_LAYOUTS_OF_MUON) == 9


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_the_whole_matrix_agrees(tmp_path: Path) -> None:
    cases = {world_size: whole_matrix(world_size) for world_size in (1, 2, 4)}
    matrix = {
        world_size: run_cases(
            "training_steps", entries, world_size, tmp_path / f"ranks{world_size}"
        )
        for world_size, entries in cases.items()
    }
    assert check_all(matrix, cases) == sum(map(len, cases.values())) - 12
