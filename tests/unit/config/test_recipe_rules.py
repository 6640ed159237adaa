"""Sections that contradict each other are refused, with a sentence that says what to change."""

from __future__ import annotations

import pytest

from pretrain.config.load import load_recipe
from pretrain.config.rules.phases import PHASE_RULES
from pretrain.config.rules.sections import RULES, check_topology, warnings_about
from pretrain.core.errors import ConfigError

NATIVE = ["model.moe.kind=deepspeed", "model.moe.drop_tokens=false"]
PEER = "model.moe={kind: peer, product_key_sizes: [4, 4], query_dim: 8, num_heads: 2, top_k: 2}"
ONE_CHOICE = [*NATIVE, "model.moe.top_k=1", "model.moe.router.norm_topk_prob=false"]

LATENT = (
    "model.attention={kind: mla, num_attention_heads: 4, kv_lora_rank: 12, qk_rope_head_dim: 4,"
    " qk_nope_head_dim: 8, v_head_dim: 6, kernel: flash}"
)

# Rule -> (overrides that break it, parts of the sentence, overrides that fix it)
BROKEN = {
    "kernel_computes_the_recipe": (
        ["model.attention.kernel=flex", "model.dropout.attention=0.1"],
        ["kernel=flex cannot compute dropout", "use reference or sdpa"],
        ["model.attention.kernel=sdpa"],
    ),
    "kernel_computes_the_recipe/values": (
        [LATENT, "train.precision=bf16"],
        ["kernel=flash cannot compute values_of_another_width", "use reference or sdpa or flex"],
        ["model.attention.v_head_dim=12"],
    ),
    "kernel_computes_the_recipe/wide_heads": (
        [
            LATENT,
            "train.precision=bf16",
            "model.attention.v_head_dim=12",
            "model.attention.kv_lora_rank=256",
        ],
        ["kernel=flash cannot compute heads_wider_than_256"],
        ["model.attention.decode=plain"],
    ),
    "heads_fit": (
        ["model.attention.num_key_value_heads=3"],
        ["num_attention_heads (4)", "num_key_value_heads (3)"],
        ["model.attention.num_attention_heads=6"],
    ),
    "sizes_can_be_counted": (
        ["model.attention.head_dim=1000000", "model.attention.num_attention_heads=20"],
        ["20000000 score elements", "lower num_attention_heads"],
        ["model.attention.head_dim=10"],
    ),
    "rotary_dim_is_even": (
        ["model.attention.head_dim=7"],
        ["head_dim (7) must be even"],
        ["model.attention.head_dim=6"],
    ),
    "rotary_dim_is_even/latent": (
        [LATENT, "model.attention.kernel=sdpa", "model.attention.qk_rope_head_dim=3"],
        ["qk_rope_head_dim (3) must be even"],
        ["model.attention.qk_rope_head_dim=2"],
    ),
    "layers_have_their_sections": (
        ["model.moe=null"],
        ["no model.moe", "all_dense"],
        ["model.layer_pattern.kind=all_dense", "model.intermediate_size=8"],
    ),
    "layers_have_their_sections/width": (
        ["model.layer_pattern={kind: every_nth, n: 2}"],
        ["model.intermediate_size is missing"],
        ["model.intermediate_size=8"],
    ),
    "sequence_fits_positions": (
        ["train.sequence_length=257"],
        ["train.sequence_length (257)", "max_position_embeddings (256)"],
        ["model.max_position_embeddings=257"],
    ),
    "micro_batch_divides": (
        ["train.micro_batch_size=3"],
        ["global_batch_size (8)", "micro_batch_size (3)"],
        ["train.global_batch_size=9"],
    ),
    "options_of_experts_fit/causal": (
        ["model.moe.kind=deepspeed"],
        ["not causal", "drop_tokens=false", "causal=false"],
        ["model.moe.causal=false"],
    ),
    "options_of_experts_fit": (
        [*NATIVE, "model.moe.use_rts=true"],
        ["use_rts works with top_k=1 only, not 2"],
        ["model.moe.use_rts=false"],
    ),
    "options_of_experts_fit/sampling": (
        [*ONE_CHOICE, "model.moe.top2_2nd_expert_sampling=true"],
        ["top_k=2 only, not 1"],
        ["model.moe.top2_2nd_expert_sampling=false"],
    ),
    "options_of_experts_fit/noise": (
        [*NATIVE, "model.moe.noisy_gate_policy=RSample"],
        ["RSample works with top_k=1 only"],
        ["model.moe.noisy_gate_policy=Jitter"],
    ),
    "options_of_experts_fit/one": (
        [*NATIVE, "model.moe.top_k=1", "model.moe.router.norm_topk_prob=true"],
        ["top_k=1", "norm_topk_prob=False"],
        ["model.moe.router.norm_topk_prob=false"],
    ),
    "options_of_experts_fit/two": (
        [*NATIVE, "model.moe.router.norm_topk_prob=false"],
        ["norm_topk_prob=True", "gate=router"],
        ["model.moe.router.norm_topk_prob=true"],
    ),
    "options_of_experts_fit/groups": (
        [*NATIVE, "model.moe.router.groups={num_groups: 2, top_k_groups: 1}"],
        ["model.moe.router.groups does not go with DeepSpeed's own gate"],
        ["model.moe.gate=router"],
    ),
    "experts_divide": (
        ["parallel.ep_size=3"],
        ["ep_size (3) does not divide model.moe.num_experts (4)"],
        ["parallel.ep_size=4"],
    ),
    "experts_divide/dense": (
        ["parallel.ep_size=2", "model.layer_pattern.kind=all_dense", "model.intermediate_size=8"],
        ["no MoE layer", "ep_size=1"],
        ["parallel.ep_size=1"],
    ),
    "experts_divide/product": (
        [PEER, "parallel.ep_size=5"],
        ["ep_size (5) does not divide model.moe.product_key_sizes, whose product is (16)"],
        ["parallel.ep_size=8"],
    ),
    "experts_go_with_dropout": (
        [PEER, "model.dropout.expert=0.1"],
        ["dropout.expert=0.1", "dropout.feed_forward"],
        ["model.dropout.expert=0"],
    ),
    "sequence_is_shared_evenly": (
        ["parallel.sp_size=4", "train.sequence_length=30"],
        ["sp_size (4) does not divide train.sequence_length (30)"],
        ["train.sequence_length=32"],
    ),
    "sequence_is_shared_evenly/heads": (
        ["parallel.sp_size=8"],
        ["sp_size (8) does not divide model.attention.num_attention_heads (4)"],
        ["model.attention.num_attention_heads=8"],
    ),
    "sequence_is_shared_evenly/key_heads": (
        [
            "parallel.sp_size=2",
            "model.attention.num_attention_heads=6",
            "model.attention.num_key_value_heads=3",
        ],
        ["sp_size (2) neither divides", "the 3 key heads of"],
        ["parallel.sp_size=3", "train.sequence_length=60"],
    ),
    "tensors_can_be_cut/layer": (
        ["parallel.tp_size=2", "model.moe={kind: peer, product_key_sizes: [4, 4], query_dim: 8}"],
        ["tp_size is 2", "no MoE layer of kind dropless or deepspeed"],
        ["parallel={sp_size: 2, tp_size: 1}"],
    ),
    "tensors_can_be_cut/optimizer": (
        ["parallel.tp_size=2", "optimizer={kind: muon, learning_rate: 0.001}"],
        ["tp_size is 2", "optimizer.kind=muon"],
        ["optimizer={kind: lion, learning_rate: 0.001}"],
    ),
    "tensors_can_be_cut/codes": (
        ["parallel.tp_size=2", "optimizer={kind: adamw_8bit, learning_rate: 0.001}"],
        ["tp_size is 2", "optimizer.kind=adamw_8bit"],
        ["optimizer={kind: adamw, learning_rate: 0.001}"],
    ),
    "tensors_can_be_cut/norm": (
        ["parallel.tp_size=2", "model.attention.qk_norm=full"],
        ["tp_size is 2", "qk_norm=full"],
        ["model.attention.qk_norm=head"],
    ),
    "tensors_can_be_cut/shared": (
        [
            "parallel.tp_size=4",
            "model.moe.num_shared_experts=1",
            "model.moe.shared_intermediate_size=30",
        ],
        ["tp_size is 4", "joint width of the shared experts (30)"],
        ["model.moe.shared_intermediate_size=32"],
    ),
    "tensors_can_be_cut/vocabulary": (
        ["parallel.tp_size=4", "model.vocab_size=130", "model.vocab_multiple=2"],
        ["tp_size is 4", "model.vocab_multiple (2)"],
        ["model.vocab_multiple=4"],
    ),
    "exchange_fits/rows": (
        ["model.moe.exchange=deepep", "model.moe.deduplicate=false", "parallel.ep_size=2"],
        ["deduplicate=false", "exchange=deepep", "exchange=all_to_all"],
        ["model.moe.exchange=all_to_all"],
    ),
    "exchange_fits/one_rank": (
        ["model.moe.exchange=deepep"],
        ["exchange=deepep would move nothing", "parallel.ep_size is 1"],
        ["parallel.ep_size=2"],
    ),
    "exchange_fits/dropout": (
        ["model.moe.deduplicate=true", "model.dropout.expert=0.1"],
        ["dropout.expert=0.1", "deduplicate=true", "leave one of them out"],
        ["model.dropout.expert=0"],
    ),
    "optimizer_trains_tables": (
        [PEER, "optimizer={kind: lion, learning_rate: 1e-3}"],
        ["optimizer.kind=lion", "model.moe.kind=peer", "adamw, muon or sgd"],
        ["optimizer={kind: sgd, learning_rate: 1e-3}"],
    ),
    "token_budget_fills_the_run": (
        ["data.mixture={kind: tokens, tokens: {all: 10000}}"],
        ["data.mixture.tokens add up to 10000", "train_tokens is 10240"],
        ["data.mixture.tokens.all=10240"],
    ),
    "streams_are_read_once": (
        ["data.streaming=true", "data.packing.kind=best_fit"],
        ["one by one", "data.packing.kind=best_fit"],
        ["data.packing.kind=concatenate"],
    ),
    "streams_are_read_once/duplicates": (
        ["data.streaming=true", "data.cleaning.exact_duplicates=true"],
        ["data.cleaning.exact_duplicates", "build shards"],
        ["data.streaming=false"],
    ),
    "streams_are_read_once/shares": (
        [
            "data.source=null",
            "data.sources={a: {kind: python_stdlib}, b: {kind: python_stdlib}}",
            "data.streaming=true",
        ],
        ["how large its sources are", "kind=weights"],
        ["data.mixture={kind: weights, weights: {a: 1, b: 2}}"],
    ),
    "evaluations_meet_checkpoints": (
        ["evaluation={interval_steps: 15}"],
        ["evaluation.interval_steps (15)", "checkpoint.interval_steps (10)"],
        ["evaluation={interval_steps: 20}"],
    ),
    "evaluations_meet_checkpoints/nothing": (
        ["evaluation={heldout: false}"],
        ["evaluation asks for nothing", "evaluation.heldout=true"],
        ["evaluation={heldout: true}"],
    ),
    "optimizer_sees_whole_matrices": (
        ["optimizer={kind: muon, learning_rate: 1e-3}", "model.feed_forward.kind=gelu"],
        [
            "optimizer.kind=muon",
            "model.feed_forward.kind=gelu",
            "kept in halves",
            "model.feed_forward.kind=swiglu",
        ],
        ["model.feed_forward.kind=swiglu"],
    ),
    "warmup_fits": (
        ["schedule.warmup_steps=21"],
        ["warmup_steps (21)", "20 steps"],
        ["schedule.warmup_steps=20"],
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_each_rule_refuses_and_its_advice_helps(name: str) -> None:
    overrides, parts, remedy = BROKEN[name]
    with pytest.raises(ConfigError) as caught:
        load_recipe("debug", overrides)
    for part in parts:
        assert part in str(caught.value)
    load_recipe("debug", [*overrides, *remedy])


def test_batch_norm_over_queries_is_warned_about() -> None:
    assert "running statistics" in " ".join(
        warnings_about(load_recipe("debug", [PEER, "model.moe.query_norm=batch_norm"]))
    )
    assert not warnings_about(load_recipe("debug", [PEER])) and not warnings_about(
        load_recipe("debug")
    )


def test_every_rule_has_a_case() -> None:
    of_phases = {rule.__name__ for rule in PHASE_RULES} | {
        "phases_can_run"
    }  # tests/unit/config/test_timeline.py
    of_widths = {
        "base_fits_the_model",
        "mup_knows_the_parts",
    }  # tests/unit/config/test_width_rules.py
    assert {name.partition("/")[0] for name in BROKEN} == {
        rule.__name__ for rule in RULES
    } - of_phases - of_widths


@pytest.mark.parametrize(
    "world_size,micro_batch_size,accumulation",
    [(1, 2, 4), (2, 2, 2), (4, 2, 1), (1, 8, 1), (8, 1, 1)],
)
def test_accumulation_is_derived_from_the_launch(
    world_size: int, micro_batch_size: int, accumulation: int
) -> None:
    recipe = load_recipe("debug", [f"train.micro_batch_size={micro_batch_size}"])
    assert check_topology(recipe, world_size, zero_stage=1) == accumulation


def test_ranks_that_share_sequences_take_more_micro_batches() -> None:
    assert check_topology(load_recipe("debug", ["parallel.sp_size=2"]), 4, zero_stage=1) == 2
    assert check_topology(load_recipe("debug", ["parallel.sp_size=4"]), 4, zero_stage=1) == 4


def test_the_length_of_each_phase_is_shared_evenly() -> None:
    phases = "phases=[{name: short, tokens: 2048, sequence_length: 2}, {name: long}]"
    with pytest.raises(ConfigError) as caught:
        load_recipe("debug", ["parallel.sp_size=4", phases])
    assert "phases.short: parallel.sp_size (4) does not divide" in str(caught.value)


@pytest.mark.parametrize(
    "overrides,world_size,zero_stage,parts",
    [
        (
            ["parallel.ep_size=2"],
            1,
            1,
            [
                "ep_size (2) does not divide the number of ranks (1)",
                "multiple of 2 ranks",
                "--set parallel.ep_size=1",
            ],
        ),
        (["parallel.ep_size=4"], 6, 1, ["--set parallel.ep_size=2"]),
        (
            ["train.micro_batch_size=4"],
            4,
            1,
            ["global_batch_size (8)", "4 x 4", "change the batch sizes or the number of ranks"],
        ),
        ([], 3, 1, ["2 x 3"]),
        (
            ["parallel.sp_size=2"],
            3,
            1,
            [
                "sp_size x tp_size (2) does not divide the number of ranks (3)",
                "multiple of 2 ranks",
            ],
        ),
        (
            ["parallel.sp_size=2"],
            6,
            1,
            ["micro_batch_size x ranks (2 x 6) / those that share a sequence (2)"],
        ),
        (NATIVE, 2, 3, ["ZeRO stage 3", "ds_configs/zero2.json", "model.moe.kind=dropless"]),
    ],
)
def test_a_launch_that_cannot_work_is_refused(
    overrides: list[str], world_size: int, zero_stage: int, parts: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_topology(load_recipe("debug", overrides), world_size, zero_stage)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("kind,zero_stage", [("native", 2), ("dropless", 3), ("dense", 3)])
def test_zero_stages_that_a_kind_supports_are_allowed(kind: str, zero_stage: int) -> None:
    overrides = {
        "native": NATIVE,
        "dropless": [],
        "dense": [*NATIVE, "model.layer_pattern.kind=all_dense", "model.intermediate_size=8"],
    }
    assert check_topology(load_recipe("debug", overrides[kind]), 2, zero_stage) == 2
