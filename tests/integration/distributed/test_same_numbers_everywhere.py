"""Loss and gradient norm do not depend on the number of ranks, ep_size, ZeRO stage or kind of MoE
layer.

All engines of one world size share one start of the processes. A spanning selection runs always,
the whole matrix with ``-m full``.
"""

from __future__ import annotations

from statistics import mean

import pytest
from deepspeed.accelerator import get_accelerator

from tests.support.ranks import Case, Results, run_cases
from tests.support.training_cases import (
    ADAMW,
    EIGHT_BIT,
    LION,
    MUON,
    OPTIMIZERS,
    case,
    check_all,
    difference,
)

DOCUMENTS = ("data.document_mask=true",)
RECOMPUTED = ("train.activation_checkpointing=true",)
SELECTIVE = ("train.activation_checkpointing=selective",)
GLOBAL = ("model.moe.balance_scope=global_batch",)
JOINED = ("model.moe.deduplicate=true",)  # a token travels to a rank once
LOW = {precision: (f"train.precision={precision}",) for precision in ("bf16", "fp16")}
BIASED = ("model.feed_forward={kind: clamped_swiglu, bias: true}", "model.attention.bias=all")
NARROW = ("model.feed_forward={kind: gelu, bias: true}",)  # its w2 is wider than w1 and w3
RUNNING = ("model.moe.query_norm=batch_norm",)
# What is drawn for a token belongs to its micro batch, not to the rank that computes it.
RANDOM = (
    "model.dropout={embedding: 0.1, attention: 0.1, residual: 0.2, expert: 0.2}",
    "model.moe.router.jitter=0.1",
)
AHEAD = ("model.multi_token_prediction={loss_weight: 0.3}",)
WIDER = (
    (
        "model.initialization={kind: mup, base: {hidden_size: 8, num_attention_heads: 2,"
        " num_key_value_heads: 1, moe_intermediate_size: 16}}"
    ),
    "model.initialization.base.head_dim=4",
)
MOVED = {"changes": True, "overrides": ("train.grad_clip=0", "train.micro_batch_size=1")}
SPANNING: dict[int, list[Case]] = {
    1: [
        case("dropless", 0, 1), case("deepspeed", 0, 1), case("dropless", 0, 1, ADAMW),
        case("dropless", 0, 1, expert_gain=10.0),
        case("dropless", 0, 1, overrides=GLOBAL), case("dropless", 0, 1, overrides=DOCUMENTS),
        case("dropless", 0, 1, overrides=RECOMPUTED), case("dropless", 0, 1, overrides=JOINED),
        case("deepspeed", 0, 1, overrides=RECOMPUTED), case("dropless", 0, 1, **MOVED),
        case("dropless", 0, 1, overrides=SELECTIVE), case("peer", 0, 1, overrides=SELECTIVE),
        case("dropless", 0, 1, overrides=SELECTIVE, gathered=True),
        case("deepspeed", 0, 1, **MOVED),
        case("dropless_full", 0, 1, overrides=BIASED),
        case("deepspeed_full", 0, 1, overrides=BIASED),
        case("dropless_full", 0, 1, overrides=NARROW),
        case("dropless", 0, 1, overrides=AHEAD), case("dropless", 0, 1, ADAMW, WIDER),
        *(
            case(kind, zero, 1, ADAMW, LOW["bf16"])
            for kind in ("dropless", "peer") for zero in (0, 1, 3)
        ),
        *(
            case(kind, zero, 1, ADAMW, LOW["fp16"])
            for kind in ("dropless", "peer") for zero in (0, 1, 3)
            if get_accelerator().is_fp16_supported()
        ),
        case("peer", 0, 1), case("peer", 0, 1, ADAMW), case("peer", 0, 1, expert_gain=10.0),
        case("peer", 0, 1, **MOVED),
        case("peer", 0, 1, overrides=RUNNING), case("peer", 0, 1, overrides=RECOMPUTED),
        *(case("dropless", 0, 1, optimizer) for optimizer in (MUON, LION, EIGHT_BIT)),
        case("dropless", 0, 1, MUON, starved=4),
        case("dropless", 0, 1, overrides=RANDOM), case("dropless", 0, 1, overrides=RANDOM + GLOBAL),
    ],
    2: [
        case("dropless", 0, 2), case("dropless", 1, 2), case("dropless", 2, 1),
        case("dropless", 3, 2), case("deepspeed", 1, 2),
        case("dropless", 2, 2, ADAMW), case("dropless", 3, 2, ADAMW),
        case("dropless", 0, 2, expert_gain=10.0),
        case("dropless", 1, 2, expert_gain=10.0), case("dropless", 1, 2, overrides=GLOBAL),
        case("dropless", 2, 2, **MOVED),
        case("deepspeed", 0, 2, **MOVED), case("dropless", 0, 2, sabotage="expert_gradient_scaled"),
        case("dropless", 0, 2, expert_gain=10.0, sabotage="rank_norm_dropped"),
        case("dropless", 3, 2, overrides=RECOMPUTED),
        case("deepspeed", 1, 2, overrides=RECOMPUTED), case("dropless", 1, 2, overrides=DOCUMENTS),
        case("dropless", 1, 2, overrides=JOINED),
        case("dropless", 1, 2, overrides=SELECTIVE), case("peer", 1, 2, overrides=SELECTIVE),
        case("dropless", 3, 2, overrides=SELECTIVE, gathered=True),
        case("dropless_full", 1, 2, overrides=BIASED),
        case("dropless_full", 3, 2, overrides=BIASED),
        case("dropless_full", 0, 1, overrides=BIASED),
        case("deepspeed_full", 1, 2, overrides=BIASED),
        case("dropless_full", 3, 2, overrides=NARROW), case("dropless", 3, 2, overrides=AHEAD),
        case("dropless", 1, 2, ADAMW, WIDER), case("dropless", 3, 2, ADAMW, WIDER),
        case("peer", 0, 1), case("peer", 1, 2), case("peer", 1, 1, ADAMW),
        case("peer", 3, 2, ADAMW), case("peer", 0, 2, expert_gain=10.0),
        case("peer", 2, 1, expert_gain=10.0), case("peer", 3, 1, expert_gain=10.0),
        case("peer", 1, 2, expert_gain=10.0, sabotage="table_norm_dropped"),
        case("peer", 2, 2, **MOVED), case("peer", 2, 2, overrides=RUNNING),
        case("peer", 1, 2, overrides=RECOMPUTED),
        *(case("dropless", zero, ep_size, MUON) for zero, ep_size in ((1, 2), (2, 1), (3, 2))),
        case("dropless", 3, 1, LION),
        case("dropless", 2, 2, EIGHT_BIT), case("dropless", 1, 1, MUON, sabotage="matrices_turned"),
        case("dropless", 1, 1, MUON, starved=4), case("dropless", 3, 1, MUON, starved=4),
        case("dropless", 3, 1, MUON, starved=4, sabotage="marks_kept"),
        case("dropless", 1, 2, overrides=RANDOM), case("dropless", 3, 1, overrides=RANDOM),
        case("dropless", 1, 2, overrides=RANDOM + GLOBAL),
    ],
    4: [
        case("dropless", 0, 4), case("dropless", 3, 2), case("deepspeed", 2, 4),
        case("dropless", 1, 4, ADAMW),
        case("dropless", 2, 2, expert_gain=10.0), case("dropless", 0, 2, overrides=GLOBAL),
        case("dropless", 3, 4, **MOVED), case("dropless", 3, 4, overrides=JOINED),
        case("dropless", 2, 2, overrides=JOINED),
        case("dropless", 2, 2, overrides=DOCUMENTS), case("dropless_full", 2, 4, overrides=BIASED),
        case("dropless_full", 0, 2, overrides=NARROW),
        case("peer", 2, 4), case("peer", 1, 2, ADAMW), case("peer", 3, 2, ADAMW),
        case("peer", 1, 2, **MOVED), case("peer", 2, 4, overrides=RUNNING),
        case("dropless", 2, 4, overrides=RANDOM),
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def spanning(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Results]:
    return {
        world_size: run_cases(
            "training_steps", cases, world_size, tmp_path_factory.mktemp(f"ranks{world_size}")
        )
        for world_size, cases in SPANNING.items()
    }


def test_selective_recomputation_changes_no_bit_and_repeats_no_exchange(
    spanning: dict[int, Results],
) -> None:
    results = spanning[2]
    for kind in ("dropless", "peer"):
        name = f"{kind}-sgd/zero1/ep2"
        plain, selective = results[name], results[case(kind, 1, 2, overrides=SELECTIVE)["name"]]
        assert all(plain[key] == selective[key] for key in ("nll", "loss", "grad_norm")), kind
        assert plain["collectives"] == selective["collectives"], kind
    full = results[case("peer", 1, 2, overrides=RECOMPUTED)["name"]]
    assert full["collectives"]["all_gather_into_tensor"] > 0
    assert full["collectives"] != plain["collectives"]


def test_losses_and_norms_agree_over_ranks_ep_size_and_zero_stage(
    spanning: dict[int, Results],
) -> None:
    compared = check_all(
        spanning,
        SPANNING,
        skip=lambda entry: (
            "sabotage" in entry or "changes" in entry or "precision" in entry["name"]
        ),
    )
    assert compared >= 15


def test_both_kinds_of_layer_give_the_same_run(spanning: dict[int, Results]) -> None:
    found = difference(
        spanning[1]["deepspeed-sgd/zero0/ep1"], spanning[1]["dropless-sgd/zero0/ep1"]
    )
    assert found <= 1e-6


@pytest.mark.parametrize("kind", ["dropless", "deepspeed", "peer"])
def test_recomputed_blocks_change_no_digit(spanning: dict[int, Results], kind: str) -> None:
    plain, recomputed = (
        spanning[1][f"{label}/zero0/ep1"]
        for label in (f"{kind}-sgd", case(kind, 0, 1, overrides=RECOMPUTED)["label"])
    )
    assert difference(recomputed, plain) == 0


def test_both_kinds_of_layer_take_every_router_loss_and_bias_alike(
    spanning: dict[int, Results],
) -> None:
    dropless, native = (
        spanning[1][f"{case(kind, 0, 1, overrides=BIASED)['label']}/zero0/ep1"]
        for kind in ("dropless_full", "deepspeed_full")
    )
    assert difference(native, dropless) <= 1e-6
    assert native["balance_bias"] == dropless["balance_bias"]


@pytest.mark.parametrize(
    "world_size,name", [(1, "zero0/ep1"), (2, "zero1/ep2"), (2, "zero3/ep2"), (4, "zero2/ep4")]
)
def test_the_balance_bias_moves_alike_everywhere(
    spanning: dict[int, Results], world_size: int, name: str
) -> None:
    """Project 828 has such a bias as a parameter that nothing updates."""
    label = case("dropless_full", 0, 1, overrides=BIASED)["label"]
    biases = spanning[world_size][f"{label}/{name}"]["balance_bias"]
    assert len(biases) == 2 and max(abs(value) for bias in biases for value in bias) >= 0.02
    assert all(sum(bias) == pytest.approx(0, abs=1e-6) for bias in biases)
    assert biases == spanning[1][f"{label}/zero0/ep1"]["balance_bias"]


def test_clipping_was_active_and_experts_held_most_of_the_norm(
    spanning: dict[int, Results],
) -> None:
    plain, gained = (
        spanning[1]["dropless-sgd/zero0/ep1"],
        spanning[1]["dropless-sgd-expert_gain=10.0/zero0/ep1"],
    )
    assert min(plain["grad_norm"]) > 0.3
    assert gained["grad_norm"][0] > 2 * plain["grad_norm"][0]


@pytest.mark.parametrize(
    "world_size,kind,name",
    [
        (2, "dropless", "zero2/ep2"),
        (2, "deepspeed", "zero0/ep2"),
        (4, "dropless", "zero3/ep4"),
        (2, "peer", "zero2/ep2"),
        (4, "peer", "zero1/ep2"),
    ],
)
def test_every_weight_and_expert_moves_and_moves_as_with_one_rank(
    spanning: dict[int, Results], world_size: int, kind: str, name: str
) -> None:
    """Plain SGD without clipping moves a weight by its gradient: so this compares every gradient,
    those of each expert by its global number.
    """
    label = case(kind, 0, 1, **MOVED)["label"]
    reference, row = (
        spanning[1][f"{label}/zero0/ep1"]["changes"],
        spanning[world_size][f"{label}/{name}"]["changes"],
    )
    assert reference.keys() == row.keys()
    assert sum(".experts." in weight for weight in row) == 2 * (32 if kind == "peer" else 4) * 3
    scale = max(length for length, _ in reference.values())
    for weight, (length, product) in row.items():
        assert length > 0, f"{weight} did not move"
        assert abs(length - reference[weight][0]) <= 1e-6 * scale, weight
        assert abs(product - reference[weight][1]) <= 1e-5 * scale, weight


@pytest.mark.parametrize("precision", LOW)
def test_low_precision_stays_close_to_fp32_at_every_stage(
    spanning: dict[int, Results], precision: str
) -> None:
    """Over ten steps an optimizer step too many, or a gradient scaled once too often, moves the
    mean loss by three times the tolerance.
    """
    if precision == "fp16" and not get_accelerator().is_fp16_supported():
        pytest.skip("this device does not compute in fp16")
    rows = [row for name, row in spanning[1].items() if f"precision={precision}" in name]
    assert len(rows) >= 3
    for row in rows:
        assert all(row["applied"])
        assert mean(row["nll"]) == pytest.approx(
            mean(spanning[1][f"{row['name'].split('-train')[0]}/zero0/ep1"]["nll"]), rel=1e-3
        ), row["name"]


def test_a_table_left_out_of_the_norm_is_noticed(spanning: dict[int, Results]) -> None:
    gained = spanning[1]["peer-sgd-expert_gain=10.0/zero0/ep1"]
    assert gained["grad_norm"][0] > 1.5 * spanning[1]["peer-sgd/zero0/ep1"]["grad_norm"][0]
    assert (
        difference(
            spanning[2]["peer-sgd-expert_gain=10.0-sabotage=table_norm_dropped/zero1/ep2"], gained
        )
        > 1e-3
    )


@pytest.mark.parametrize(
    "fault", ["sabotage=expert_gradient_scaled", "expert_gain=10.0-sabotage=rank_norm_dropped"]
)
def test_a_broken_engine_is_noticed(spanning: dict[int, Results], fault: str) -> None:
    reference = "dropless-sgd-expert_gain=10.0" if "gain" in fault else "dropless-sgd"
    found = difference(
        spanning[2][f"dropless-sgd-{fault}/zero0/ep2"], spanning[1][f"{reference}/zero0/ep1"]
    )
    assert found > 1e-6


def test_a_matrix_put_together_wrongly_is_noticed(spanning: dict[int, Results]) -> None:
    found = difference(
        spanning[2]["dropless-muon-sabotage=matrices_turned/zero1/ep1"],
        spanning[1]["dropless-muon/zero0/ep1"],
    )
    assert found > 1e-4


def test_a_rank_that_looks_only_at_its_own_part_of_a_gradient_is_noticed(
    spanning: dict[int, Results],
) -> None:
    found = difference(
        spanning[2]["dropless-muon-starved=4-sabotage=marks_kept/zero3/ep1"],
        spanning[1]["dropless-muon-starved=4/zero0/ep1"],
    )
    assert found > 1e-5


def test_optimizers_differ_from_each_other(spanning: dict[int, Results]) -> None:
    rows = [spanning[1][f"dropless-{kind}/zero0/ep1"] for kind in OPTIMIZERS]
    # The first step's loss is before any update; AdamW's runs are longer.
    assert all(
        abs(row["nll"][5] - other["nll"][5]) > 1e-6 * row["nll"][5]
        for number, row in enumerate(rows)
        for other in rows[:number]
    )
    assert all(row["nll"][-1] < row["nll"][0] - 0.05 for row in rows)
