"""Every registered kind and option gives the same run with its experts on one rank and spread over
two.
"""

from __future__ import annotations

import pytest

from tests.support.model_kinds import CASES
from tests.support.ranks import Case, Results, run_cases
from tests.support.training_cases import SIZES, difference

# A dense model has no experts to spread.
SPREAD = {name: overrides for name, overrides in CASES.items() if name != "layer_pattern=all_dense"}


def case(name: str, ep_size: int, zero: int) -> Case:
    overrides = [
        *SIZES,
        "optimizer={kind: sgd, learning_rate: 0.5}",
        *SPREAD[name],
        f"parallel.ep_size={ep_size}",
    ]
    return {"name": f"{name}/ep{ep_size}", "zero": zero, "steps": 3, "overrides": overrides}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Both on two ranks: random numbers are drawn by each rank for its own tokens, so that noise is
    the same too.
    """
    cases = [case(name, ep_size, zero) for name in SPREAD for ep_size, zero in ((1, 0), (2, 1))]
    return run_cases("training_steps", cases, 2, tmp_path_factory.mktemp("every_kind"))


@pytest.mark.parametrize("name", SPREAD)
def test_experts_on_two_ranks_give_the_run_of_experts_on_one(results: Results, name: str) -> None:
    spread, whole = results[f"{name}/ep2"], results[f"{name}/ep1"]
    assert difference(spread, whole) <= 1e-6
    assert spread["balance_bias"] == whole["balance_bias"]
    assert len(set(whole["loss"])) == 3  # something was learned
