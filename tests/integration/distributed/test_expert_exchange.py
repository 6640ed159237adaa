"""Tokens that travel to experts on other ranks: overlapped, once a rank, with one wait a layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import Case, Results, run_cases

MOE = "kind: dropless, moe_intermediate_size: 24, aux_loss_weight: 0.05, z_loss_weight: 0.01"
SHARED = "num_shared_experts: 1, shared_expert_gate: true"
# Four of eight experts: with two ranks nearly every token has several on one of them.
MANY = (f"model.moe={{{MOE}, num_experts: 8, top_k: 4, {SHARED}}}",)
FEW = (f"model.moe={{{MOE}, num_experts: 4, top_k: 2}}",)
BIASED = (
    f"model.moe={{{MOE}, num_experts: 8, top_k: 3, router: {{kind: sigmoid_topk, bias: true}}}}",
    "model.feed_forward={kind: clamped_swiglu, bias: true}",
)
ONE = (f"model.moe={{{MOE}, num_experts: 4, top_k: 1}}",)
SIXTY_FOUR = (
    f"model.moe={{{MOE}, num_experts: 64, top_k: 8}}",
    "model.hidden_size=256",
    "model.num_hidden_layers=1",
)
GROUPED = ("model.moe.expert_kernel=grouped_mm",)
MODELS = {"many": MANY, "few": FEW, "biased": BIASED}


def case(run: str, name: str, overrides: tuple[str, ...], ep_size: int, **more: Any) -> Case:
    label = "-".join([run, name, *(f"{key}={value}" for key, value in more.items()), str(ep_size)])
    return {"name": label, "run": run, "overrides": overrides, "ep_size": ep_size, **more}


def cases_of(world_size: int) -> list[Case]:
    cases = []
    for ep_size in {2, world_size}:
        for name, overrides in MODELS.items():
            cases += [
                case("against_one_rank", name, overrides, ep_size),
                case("against_one_rank", name, overrides, ep_size, recomputed=True),
                case("against_blocking", name, overrides, ep_size),
            ]
        cases.append(case("against_one_rank", "many", MANY, ep_size, dtype="bfloat16"))
        # All tokens choose one expert: the other ranks get no row at all.
        cases.append(case("against_one_rank", "one", ONE, ep_size, one_expert=True))
        cases.append(case("through_deep_ep", "many", MANY, ep_size, dtype="bfloat16"))
    if world_size == 2:
        # Experts of one rank in fp32 wait for their counts on a CPU: the grouped product does not.
        for recomputed in (False, True):
            for name, joined in (("rows", "false"), ("joined", "true")):
                overrides = (*MANY, *GROUPED, f"model.moe.deduplicate={joined}")
                cases.append(case("waits", name, overrides, 2, recomputed=recomputed))
        for name, joined in (("rows", "false"), ("joined", "true")):
            cases.append(case("order", name, (*MANY, f"model.moe.deduplicate={joined}"), 2))
        for recomputed in (False, True):
            more = {"dtype": "bfloat16", "recomputed": recomputed}
            cases.append(case("through_deep_ep", "biased", BIASED, 2, **more))
    else:
        cases.append(case("rows_sent", "64", SIXTY_FOUR, 4, dtype="bfloat16"))
    return cases


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Results]:
    folder: Path = tmp_path_factory.mktemp("exchange")
    return {
        world_size: run_cases("expert_exchange", cases_of(world_size), world_size, folder / str(n))
        for n, world_size in enumerate((2, 4))
    }


def found(results: dict[int, Results], run: str) -> list[tuple[str, dict[str, Any]]]:
    return [
        (name, result)
        for of_world in results.values()
        for name, result in of_world.items()
        if name.startswith(run)
    ]


def test_losses_and_all_gradients_are_those_of_ranks_with_all_experts(
    results: dict[int, Results],
) -> None:
    compared = found(results, "against_one_rank")
    assert len(compared) == 24
    for name, result in compared:
        # Rounding of bf16 rows, of which a token's sum has a few.
        loss, gradient = (5e-3, 1e-1) if "bfloat16" in name else (1e-6, 1e-5)
        for form in ("rows", "joined"):
            assert result[form][0] <= loss and result[form][1] <= gradient, (name, form, result)
        if "one_expert" not in name:
            assert result["without_weights"][1] > 10 * gradient, (name, result)


def test_overlapped_transfers_have_the_bits_of_blocking_ones(results: dict[int, Results]) -> None:
    compared = found(results, "against_blocking")
    assert len(compared) == 9
    for name, result in compared:
        assert result["equal"] and result["compared"] > 20, (name, result)


def test_each_layer_waits_once_for_the_device(results: dict[int, Results]) -> None:
    compared = found(results, "waits")
    assert len(compared) == 4
    for name, result in compared:
        assert result["forward"] == ["tolist"] * result["layers"], name
        assert result["backward"] == [], name


def test_shared_experts_compute_while_rows_travel(results: dict[int, Results]) -> None:
    rows = results[2]["order-rows-2"]
    there, back = ["launch 32", "shared", "wait 32"], ["launch 32", "wait 32"]
    assert rows["forward"] == there + back
    assert rows["backward"] == back + there
    joined = results[2]["order-joined-2"]
    for events in (joined["forward"], joined["backward"]):
        at = events.index("shared")
        assert {"launch 32", "launch 1"} <= set(events[:at])
    # In the backward pass the rows' gradients are under way while the shared experts compute.
    assert joined["forward"].index("wait 32") > joined["forward"].index("shared")
    assert joined["backward"][-1].startswith("wait")


def test_a_token_travels_to_a_rank_once(results: dict[int, Results]) -> None:
    sent = results[4]["rows_sent-64-dtype=bfloat16-4"]
    # There and back: 256 tokens with 8 choices, of which 3/4 are elsewhere if all are as likely.
    assert 0.9 < sent["rows"]["rows"] / (2 * 256 * 8 * 3 / 4) < 1.1
    # Of 64 experts 8 are on 4 (1 - C(48, 8) / C(64, 8)) = 3.66 of 4 ranks.
    assert 0.9 < sent["joined"]["rows"] / (2 * 256 * 3.66 * 3 / 4) < 1.1
    assert sent["joined"]["bytes"] < 0.5 * sent["rows"]["bytes"]


def test_deep_ep_moves_the_same_rows(results: dict[int, Results]) -> None:
    compared = found(results, "through_deep_ep")
    assert len(compared) == 5
    for name, result in compared:
        loss, gradient = result["differences"]
        assert loss <= 5e-3 and gradient <= 1e-1, (name, result)
        layers = 2
        repeated = layers if "recomputed=True" in name else 0
        # A dispatch's gradient is a combine, and the other way round.
        assert result["calls"] == {
            "buffers": 1,
            "dispatched": layers,
            "combined": 2 * layers + repeated,
            "replayed": layers + repeated,
        }, name
        assert result["destroyed"] == 1
