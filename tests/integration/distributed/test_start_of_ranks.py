"""Ranks that compute and keep their own part of a model start with the bits of the plain start.

The oracle holds the whole model in fp32 and fills it in place (:mod:`tests.support.plain_start`);
compared are weights, master weights, tables and buffers of every rank, and the first losses.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.ranks import Case, Results, run_cases
from tests.support.training_cases import ADAMW, KINDS, MUON, SIZES

BLOCKS = {
    kind: (KINDS[kind],) for kind in ("dropless", "deepspeed", "peer", "dropless_full")
} | {
    "dense": (
        "model.layer_pattern={kind: all_dense}", "model.moe=null", "model.intermediate_size=48",
    ),
    # A matrix in two halves, which are two parameters.
    "halves": (KINDS["dropless"], "model.feed_forward={kind: gelu, bias: true}"),
    "wider": (
        KINDS["dropless"],
        "model.tie_word_embeddings=true",
        "model.initialization={kind: mup, base: {hidden_size: 8, num_attention_heads: 2,"
        " num_key_value_heads: 1, moe_intermediate_size: 16, head_dim: 4}}",
    ),
}  # fmt: skip


def case(
    kind: str,
    zero: int,
    ep_size: int,
    precision: str = "bf16",
    overrides: tuple[str, ...] = (),
    **extra: object,
) -> Case:
    settings = [*SIZES, *BLOCKS[kind], ADAMW, f"parallel.ep_size={ep_size}"]
    settings += [f"train.precision={precision}", *overrides]
    name = "/".join([kind, f"zero{zero}", f"ep{ep_size}", precision, *overrides, *map(str, extra)])
    return {"name": name, "zero": zero, "overrides": settings, **extra}


OFFLOADED = {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}
SABOTAGED = case("dropless", 3, 1, sabotage=True)
QUICK = [
    case("dropless", 3, 2), case("dropless", 3, 1), case("dropless", 1, 2), case("dense", 3, 1),
    case("peer", 3, 2), case("peer", 1, 1), case("deepspeed", 2, 2), case("dense", 0, 1),
    case("halves", 3, 2), case("wider", 3, 2), case("dropless", 3, 2, "fp32"),
    case("dropless", 3, 2, overrides=(MUON,)), case("dropless", 3, 1, zero_optimization=OFFLOADED),
    SABOTAGED,
]  # fmt: skip
KINDS_OF_BLOCKS = [("dropless", 4), ("peer", 4), ("deepspeed", 3), ("dense", 4)]
EVERY = [
    case(kind, zero, ep_size, precision)
    for kind, stages in KINDS_OF_BLOCKS
    for zero in range(stages)
    for ep_size in ((1,) if kind == "dense" else (1, 2))
    for precision in ("bf16", "fp32")
]


def check(results: Results, cases: list[Case]) -> None:
    assert len(results) == len(cases)
    for name, result in results.items():
        found, wanted = result["found"], result["wanted"]
        differing = [
            (rank, tensor)
            for rank, (mine, plain) in enumerate(
                zip(found["states"], wanted["states"], strict=True)
            )
            for tensor in mine.keys() | plain.keys()
            if mine.get(tensor) != plain.get(tensor)
        ]
        if name == SABOTAGED["name"]:
            assert differing and found["losses"] != wanted["losses"]
            continue
        assert len(found["states"]) == 2 and not differing, f"{name}: {differing[:5]}"
        assert found["losses"] == wanted["losses"], name


def test_every_rank_starts_with_the_bits_of_the_plain_start(tmp_path: Path) -> None:
    check(run_cases("initial_weights", QUICK, 2, tmp_path), QUICK)


@pytest.mark.full
def test_at_every_stage_and_ep_size(tmp_path: Path) -> None:
    check(run_cases("initial_weights", EVERY, 2, tmp_path), EVERY)
