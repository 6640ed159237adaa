"""A step that is skipped leaves nothing behind, on no rank, at no ZeRO stage; and what was not
finite in it is named.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from deepspeed.accelerator import get_accelerator

from tests.support.ranks import run_cases

SIZES = [
    "model.vocab_size=128",
    "train.global_batch_size=8",
    "train.micro_batch_size=2",
    "train.sequence_length=16",
    "parallel.ep_size=2",
]
KINDS = {
    "dropless": (
        "model.moe={kind: dropless, num_experts: 4, top_k: 2, moe_intermediate_size: 16,"
        " bias_balancing: {update_rate: 0.02}}"
    ),
    "deepspeed": (
        "model.moe={kind: deepspeed, num_experts: 4, top_k: 2, moe_intermediate_size: 16,"
        " drop_tokens: false}"
    ),
    "peer": (
        "model.moe={kind: peer, product_key_sizes: [4, 4], query_dim: 16, num_heads: 2, top_k: 3,"
        " query_norm: batch_norm}"
    ),
}
# Kind, ZeRO stage, precision, place, rank, micro batch.
SPANNING = [
    ("dropless", 0, "fp32", "dense", 0, 0),
    ("dropless", 1, "bf16", "loss", 1, 1),
    ("dropless", 2, "fp16", "expert", 1, 0),
    ("dropless", 3, "bf16", "expert", 0, 0),
    ("peer", 1, "fp32", "table", 0, 1),
]
OTHERS = [
    ("dropless", 0, "bf16", "expert", 1, 1),
    ("dropless", 0, "fp16", "expert", 0, 1),
    ("dropless", 1, "fp32", "expert", 1, 0),
    ("dropless", 2, "bf16", "expert", 0, 1),
    ("dropless", 3, "fp32", "dense", 1, 1),
    ("dropless", 3, "fp16", "loss", 0, 1),
    ("deepspeed", 1, "fp32", "expert", 1, 1),
    ("peer", 0, "fp32", "table", 1, 0),
    ("peer", 1, "bf16", "table", 0, 1),
    ("peer", 3, "fp32", "dense", 1, 1),
]
EVERY_CASE = {
    f"{kind}/zero{zero}/{precision}/{place}": {
        "name": f"{kind}/zero{zero}/{precision}/{place}",
        "overrides": [
            *SIZES,
            KINDS[kind],
            f"train.precision={precision}",
            "optimizer={kind: adamw, learning_rate: 3.0e-3}",
        ],
        "zero": zero,
        "place": place,
        "rank": rank,
        "micro_batch": micro_batch,
        # In fp16 the skipped step lowers the loss scale, so that the next update differs.
        "without_skipped": precision != "fp16",
    }
    for kind, zero, precision, place, rank, micro_batch in SPANNING + OTHERS
    if precision != "fp16" or get_accelerator().is_fp16_supported()
}
Result = dict[str, Any]


CASES = {
    name: case
    for name, case in EVERY_CASE.items()
    if (*name.split("/"),) in {(k, f"zero{z}", p, w) for k, z, p, w, *_ in SPANNING}
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    return run_cases("skipped_steps", list(CASES.values()), 2, tmp_path_factory.mktemp("skipped"))


def check_that_nothing_moved(result: Result) -> None:
    first, judged, refused, non_finite, last = result["steps"]
    assert [step["applied"] for step in result["steps"]] == [True, True, False, False, True]
    assert [step["refused"] for step in result["steps"]] == [False, False, True, False, False]
    assert first["digest"] != judged["digest"] != last["digest"]
    assert (
        refused["digest"]
        == non_finite["digest"]
        == judged["digest"]
        == result["after_search"]["digest"]
    )
    assert math.isfinite(refused["norm"]) and refused["norm"] > 0
    assert not (math.isfinite(non_finite["norm"]) and non_finite["norm"] >= 0)


def check_names(result: Result) -> None:
    case = EVERY_CASE[result["name"]]
    assert result["found"] == [
        {"rank": case["rank"], "micro_batch": case["micro_batch"], "where": result["weight"]}
    ]
    assert result["found_in_a_clean_step"] == []
    assert result["after_search"]["steps"] == 4


def check_judges(result: Result) -> None:
    (one,), (other,) = result["asked"]
    assert (
        one == other
        and one[0] == pytest.approx(math.log(128), rel=0.2)
        and one[1] == pytest.approx(result["steps"][2]["norm"], rel=1e-6)
    )


def check_scales(result: Result) -> None:
    scales = [step["scale"] for step in result["steps"]]
    assert (
        scales == [256.0, 256.0, 256.0, 128.0, 128.0] and result["after_search"]["scale"] == 128.0
    )


@pytest.mark.parametrize("name", CASES)
def test_a_skipped_step_changes_no_bit_of_weights_moments_biases_and_tables(
    results: dict[str, Result], name: str
) -> None:
    check_that_nothing_moved(results[name])


@pytest.mark.parametrize("name", CASES)
def test_rank_micro_batch_and_weight_are_named_and_a_clean_step_names_none(
    results: dict[str, Result], name: str
) -> None:
    check_names(results[name])


@pytest.mark.parametrize("name", CASES)
def test_every_rank_judges_the_same_bits(results: dict[str, Result], name: str) -> None:
    check_judges(results[name])


@pytest.mark.parametrize("name", [name for name in CASES if "fp16" in name])
def test_the_loss_scale_falls_for_an_overflow_and_stays_for_a_refusal_and_a_search(
    results: dict[str, Result], name: str
) -> None:
    check_scales(results[name])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case["without_skipped"]])
def test_training_goes_on_as_if_the_skipped_steps_had_not_been(
    results: dict[str, Result], name: str
) -> None:
    assert results[name]["steps"][-1]["digest"] == results[name]["without_skipped"]


@pytest.mark.full
def test_all_of_it_holds_for_every_kind_of_layer_precision_and_stage(tmp_path: Path) -> None:
    found = run_cases("skipped_steps", list(EVERY_CASE.values()), 2, tmp_path)
    assert found.keys() == EVERY_CASE.keys()
    for name, result in found.items():
        check_that_nothing_moved(result)
        check_names(result)
        check_judges(result)
        if "fp16" in name:
            check_scales(result)
        else:
            assert result["steps"][-1]["digest"] == result["without_skipped"]
