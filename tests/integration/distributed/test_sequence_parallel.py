"""Ranks that share sequences train as one process does: losses, norms and every weight's change."""

from __future__ import annotations

import pytest

from tests.support.ranks import Results, run_cases
from tests.support.training_cases import Case, case, check_all, difference

DOCUMENTS = ("data.document_mask=true",)
GLOBAL = ("model.moe.balance_scope=global_batch",)
AHEAD = ("model.multi_token_prediction={loss_weight: 0.3}",)
# A window over the ranks' boundaries in one of two layers, and a sink a head.
WINDOW = (
    "model.attention.sliding_window=11",
    "model.attention.full_attention_every=2",
    "model.attention.sinks=true",
    *DOCUMENTS,
    *AHEAD,
)
LATENT = (
    "model.attention={kind: mla, num_attention_heads: 4, kv_lora_rank: 16, qk_rope_head_dim: 4,"
    " qk_nope_head_dim: 8, v_head_dim: 8, sinks: true}",
    "model.position={kind: yarn, factor: 4.0, original_max_position_embeddings: 16}",
)
SLOPES = ("model.position={kind: alibi}", "model.attention.num_key_value_heads=1")
LEARNED = ("model.position={kind: learned}", "train.activation_checkpointing=true", *DOCUMENTS)
SELECTIVE = ("train.activation_checkpointing=selective", *AHEAD)
MOVED = {"changes": True, "overrides": ("train.grad_clip=0",)}
FULL = "dropless_full"

CASES: dict[int, list[Case]] = {
    2: [
        case("dropless", 0, 1, sp_size=2, **MOVED), case("dropless", 1, 2, sp_size=2, **MOVED),
        case("dropless", 2, 1, overrides=WINDOW, sp_size=2),
        case("dropless", 3, 2, overrides=DOCUMENTS, sp_size=2),
        case(FULL, 1, 2, sp_size=2), case(FULL, 0, 1, overrides=LATENT, sp_size=2),
        case("deepspeed", 1, 2, sp_size=2), case("deepspeed_full", 2, 1, sp_size=2),
        case("peer", 1, 2, sp_size=2), case("dropless", 1, 2, overrides=GLOBAL, sp_size=2),
        case("dropless", 0, 2, overrides=SELECTIVE, sp_size=2),
        case("dropless", 0, 2, overrides=SLOPES, sp_size=2),
        case("dropless", 3, 2, overrides=LEARNED, sp_size=2),
        case("dropless", 0, 2, sp_size=2, sabotage="router_means_left_out"),
    ],
    4: [
        case("dropless", 3, 2, sp_size=4, **MOVED), case("dropless", 1, 4, sp_size=2, **MOVED),
        # Fewer key heads than ranks.
        case("dropless", 2, 2, overrides=WINDOW, sp_size=4),
        case(FULL, 3, 4, sp_size=2), case("deepspeed", 2, 4, sp_size=4),
        case(FULL, 1, 2, overrides=LATENT, sp_size=4),
        case("peer", 3, 2, sp_size=4), case("dropless", 0, 1, overrides=SLOPES, sp_size=4),
        case("dropless", 1, 1, overrides=GLOBAL, sp_size=2),
    ],
}  # fmt: skip
SABOTAGED = next(entry for entry in CASES[2] if "sabotage" in entry)
CASES[1] = [
    {**entry, "name": f"{entry['label']}/zero0/ep1", "zero": 0, "overrides": alone}
    for entry in {entry["label"]: entry for cases in CASES.values() for entry in cases}.values()
    for alone in [[*entry["overrides"], "parallel={ep_size: 1, sp_size: 1}"]]
    if entry is not SABOTAGED
] + [case("dropless", 0, 1)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Results]:
    return {
        ranks: run_cases("training_steps", cases, ranks, tmp_path_factory.mktemp(f"ranks{ranks}"))
        for ranks, cases in CASES.items()
    }


def test_losses_and_norms_are_those_of_one_process(results: dict[int, Results]) -> None:
    compared = check_all(results, CASES, skip=lambda entry: entry is SABOTAGED)
    assert compared == len(CASES[2]) + len(CASES[4]) - 1


def test_router_losses_of_a_part_are_not_those_of_the_sequence(results: dict[int, Results]) -> None:
    plain = results[1][case("dropless", 0, 1)["name"]]
    assert difference(results[2][SABOTAGED["name"]], plain) > 1e-5


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_weight_moves_as_in_one_process(results: dict[int, Results], ranks: int) -> None:
    """Plain SGD without clipping moves a weight by its gradient: this compares every gradient."""
    reference = results[1][case("dropless", 0, 1, **MOVED)["name"]]["changes"]
    scale = max(length for length, _ in reference.values())
    moved = [row["changes"] for row in results[ranks].values() if row["changes"]]
    assert len(moved) == 2
    for changes in moved:
        assert changes.keys() == reference.keys()
        for weight, (length, product) in changes.items():
            assert length > 0, weight
            assert abs(length - reference[weight][0]) <= 1e-6 * scale, weight
            assert abs(product - reference[weight][1]) <= 1e-5 * scale, weight
