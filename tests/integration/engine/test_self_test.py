"""The self-test of a start passes at every topology, catches wrong gradients, and leaves no trace.

All engines share one start of two ranks.
"""

from __future__ import annotations

import pytest

from tests.support.ranks import Results, run_cases
from tests.support.training_cases import ADAMW, case

LAYOUTS = [
    *(("dropless", zero, ep_size) for zero in (0, 1, 2, 3) for ep_size in (1, 2)),
    *(("deepspeed", zero, ep_size) for zero in (0, 1, 2) for ep_size in (1, 2)),
]
SABOTAGED = [("dropless", 0, 2), ("dropless", 1, 2), ("dropless", 3, 1), ("deepspeed", 2, 2)]
SOUND = [case(*layout, ADAMW) for layout in LAYOUTS] + [
    case("dropless_full", 1, 2, ADAMW, ("model.moe.balance_scope=global_batch",)),
    case("dropless", 1, 2, ADAMW, ("train.precision=bf16",)),
    case("dropless", 2, 2, ADAMW, ("data.document_mask=true", "model.multi_token_prediction={}")),
    case("dropless", 0, 2, ADAMW, sp_size=2),
    case("deepspeed", 2, 1, ADAMW, sp_size=2),
    case("dropless_full", 3, 1, ADAMW, ("model.moe.balance_scope=global_batch",), sp_size=2),
]
WRONG = [case(*layout, ADAMW, sabotage="expert_gradient_scaled") for layout in SABOTAGED]
# Ranks that share a sequence, with the router losses of their own tokens only.
LOST_MEANS = case("dropless", 1, 2, ADAMW, sp_size=2, sabotage="router_means_left_out")
LOST_NORM = case("dropless", 0, 2, ADAMW, sabotage="rank_norm_dropped")
# The same engines without a self-test.
UNTESTED = [
    case(kind, zero, 2, ADAMW, without=True)
    for kind, zero in (("dropless", 0), ("dropless", 1), ("dropless", 2), ("deepspeed", 1))
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("self_test")
    cases = [*SOUND, *WRONG, LOST_NORM, LOST_MEANS, *UNTESTED]
    return run_cases("self_test", cases, 2, folder)


@pytest.mark.parametrize("sound", SOUND, ids=lambda sound: sound["name"])
def test_right_gradients_pass(results: Results, sound: dict) -> None:
    assert results[sound["name"]]["fault"] == ""


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong["name"])
def test_one_percent_too_much_of_one_expert_parameter_is_found(
    results: Results, wrong: dict
) -> None:
    fault = results[wrong["name"]]["fault"]
    assert fault.startswith("the self-test failed: on 2 ranks") and "gradient norm of" in fault


def test_a_wrong_norm_of_the_whole_is_found(results: Results) -> None:
    assert "gradient norm is" in results[LOST_NORM["name"]]["fault"]


def test_router_losses_of_a_part_of_the_sequence_are_found(results: Results) -> None:
    fault = results[LOST_MEANS["name"]]["fault"]
    assert "on 2 ranks with ep_size 2, sp_size 2 and ZeRO 1, " in fault


@pytest.mark.parametrize("untested", UNTESTED, ids=lambda untested: untested["name"])
def test_training_is_the_same_bit_for_bit_after_a_self_test(
    results: Results, untested: dict
) -> None:
    without = results[untested["name"]]
    tested = results[untested["name"].replace("-without=True", "")]
    for what in ("losses", "norms", "counts", "usage"):
        assert tested[what] == without[what], what
