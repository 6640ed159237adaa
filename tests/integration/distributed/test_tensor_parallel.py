"""Ranks that share tensors train as one process does, alone and with other ways of sharing."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.support.ranks import Results, run_cases
from tests.support.training_cases import ADAMW, LION, SGD, Case, case, check_all, difference

DOCUMENTS = ("data.document_mask=true",)
TIED = ("model.tie_word_embeddings=true", "model.loss_chunk_tokens=24", *DOCUMENTS)
AHEAD = ("model.multi_token_prediction={loss_weight: 0.3}", "model.output_z_loss_weight=0.01")
BIASED = (
    "model.feed_forward={kind: clamped_swiglu, bias: true}", "model.attention.bias=all",
    "model.head_bias=true",
)  # fmt: skip
# The first block is dense; an embedding of fewer elements than the hidden size.
DENSE = (
    "model.layer_pattern={kind: first_k_dense, k: 1}", "model.intermediate_size=48",
    "model.embedding_size=16",
)  # fmt: skip
LATENT = (
    "model.attention={kind: mla, num_attention_heads: 4, q_lora_rank: 12, kv_lora_rank: 16,"
    " qk_rope_head_dim: 4, qk_nope_head_dim: 8, v_head_dim: 8, sinks: true}",
)
SLOPES = ("model.position={kind: alibi}", "model.attention.num_key_value_heads=1")
SELECTIVE = ("train.activation_checkpointing=selective",)
FULL = "dropless_full"

CASES: dict[int, list[Case]] = {
    2: [
        case("dropless", 0, 1, overrides=TIED, tp_size=2),
        case("dropless", 2, 1, overrides=AHEAD, tp_size=2),
        case("dropless", 3, 2, overrides=DENSE, tp_size=2),
        case(FULL, 1, 2, overrides=BIASED, tp_size=2),
        case(FULL, 3, 1, overrides=LATENT, tp_size=2),
        case("deepspeed", 2, 2, tp_size=2), case("dropless", 1, 1, ADAMW, SELECTIVE, tp_size=2),
        case("dropless", 0, 1, tp_size=2, sabotage="rank_norm_dropped"),
    ],
    4: [
        # Fewer key heads than ranks.
        case("dropless", 1, 2, overrides=SLOPES, tp_size=4),
        case("dropless", 3, 4, overrides=TIED, sp_size=2, tp_size=2),
        case(FULL, 2, 2, overrides=LATENT, tp_size=4),
        case("deepspeed", 1, 4, sp_size=2, tp_size=2), case("dropless", 0, 2, LION, tp_size=2),
        case(FULL, 0, 2, overrides=BIASED, sp_size=2, tp_size=2),
    ],
}  # fmt: skip


def mixes(number: int) -> list[Case]:
    """Seeded mixes of everything on four ranks."""
    draw = random.Random(0)
    found: dict[str, Case] = {}
    while len(found) < number:
        kind = draw.choice(["dropless", "deepspeed", FULL, "deepspeed_full", "peer"])
        sp_size, tp_size = draw.choice([(1, 1), (2, 1), (4, 1), (1, 2), (1, 4), (2, 2)])
        if kind == "peer":
            tp_size = 1
        zero = draw.choice([0, 1, 2] if kind.startswith("deepspeed") else [0, 1, 2, 3])
        entry = case(
            kind,
            zero,
            draw.choice([1, 2, 4]),
            draw.choice([SGD, ADAMW]),
            draw.choice([(), DOCUMENTS, SELECTIVE, AHEAD]),
            sp_size=sp_size,
            tp_size=tp_size,
        )
        found[entry["name"]] = entry
    return list(found.values())


def alone(cases: list[Case]) -> list[Case]:
    """The same runs in one process."""
    return [
        {
            **entry,
            "name": f"{entry['label']}/zero0/ep1",
            "zero": 0,
            "overrides": [*entry["overrides"], "parallel={ep_size: 1, sp_size: 1, tp_size: 1}"],
        }
        for entry in {entry["label"]: entry for entry in cases}.values()
    ]


SABOTAGED = next(entry for entry in CASES[2] if "sabotage" in entry)
CASES[1] = alone([entry for entry in CASES[2] + CASES[4] if entry is not SABOTAGED])
CASES[1] += [case("dropless", 0, 1)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Results]:
    return {
        ranks: run_cases("training_steps", cases, ranks, tmp_path_factory.mktemp(f"ranks{ranks}"))
        for ranks, cases in CASES.items()
    }


def test_losses_and_norms_are_those_of_one_process(results: dict[int, Results]) -> None:
    compared = check_all(results, CASES, skip=lambda entry: entry is SABOTAGED)
    assert compared == len(CASES[2]) + len(CASES[4]) - 1


def test_a_norm_of_one_rank_alone_is_not_that_of_the_model(results: dict[int, Results]) -> None:
    plain = results[1][case("dropless", 0, 1)["name"]]
    assert difference(results[2][SABOTAGED["name"]], plain) > 1e-4


@pytest.mark.full
def test_twenty_mixes_of_all_ways_of_sharing_train_as_one_process(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    cases = {4: mixes(20)}
    cases[1] = alone(cases[4])
    found = {
        ranks: run_cases("training_steps", each, ranks, tmp_path_factory.mktemp(f"mixes{ranks}"))
        for ranks, each in cases.items()
    }
    assert check_all(found, cases) == 20


def test_products_embedding_and_loss_are_those_of_megatron_core(tmp_path: Path) -> None:
    found = run_cases("megatron_shards", [{"name": "two"}], 2, tmp_path)["two"]["differences"]
    assert len(found) == 7
    assert max(found.values()) < 1e-6, found
