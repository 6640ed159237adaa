"""Layer patterns; parameters, FLOPs and memory without tensors; each shipped ds_config resolves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pretrain.config.load import load_recipe
from pretrain.core.shipped import recipe_names
from pretrain.engine.ds_config import read_ds_config, resolve_ds_config
from pretrain.model.decoder import DecoderLM
from pretrain.model.feed_forward import SwiGLU
from pretrain.model.moe.dropless import DroplessMoE
from pretrain.model.sizes import ModelSize, cache_bytes, model_size
from pretrain.model.token_parallel import TensorParallel, TokenParts
from pretrain.optim.config import AdamWConfig
from pretrain.run.memory import activation_bytes, state_bytes_per_rank
from tests.support.paths import DS_CONFIGS
from tests.support.tiny_model import KINDS, VOCAB_SIZE, tiny_config, tiny_model

DS_CONFIG_FILES = sorted(DS_CONFIGS.glob("*.json"))
ADAMW = AdamWConfig(learning_rate=1e-3)
WIDE = "model.intermediate_size=48"
PATTERNS = {
    "{kind: all_moe}": [0, 1, 2, 3],
    "{kind: every_nth, n: 1}": [0, 1, 2, 3],
    "{kind: every_nth, n: 2}": [1, 3],
    "{kind: every_nth, n: 3}": [2],
    "{kind: first_k_dense, k: 0}": [0, 1, 2, 3],
    "{kind: first_k_dense, k: 3}": [3],
    "{kind: all_dense}": [],
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_pattern_says_which_layers_are_mixtures(pattern: str) -> None:
    model = tiny_model("model.num_hidden_layers=4", WIDE, f"model.layer_pattern={pattern}")
    found = [block.get_submodule("feed_forward") for block in model.layers]
    assert [
        index for index, module in enumerate(found) if isinstance(module, DroplessMoE)
    ] == PATTERNS[pattern]
    assert [index for index, module in enumerate(found) if isinstance(module, SwiGLU)] == [
        i for i in range(4) if i not in PATTERNS[pattern]
    ]
    assert model.config.moe_layers == PATTERNS[pattern]


SHARED = "model.moe.num_shared_experts=1"
SHARED_AND_TIED = ("model.vocab_size=512", SHARED, "model.tie_word_embeddings=true")
BIASED = (
    "model.feed_forward={kind: swiglu, bias: true}",
    "model.attention.bias=all",
    "model.head_bias=true",
    "model.attention.sinks=true",
)


def counted(overrides: tuple[str, ...], sequence_length: int = 16) -> ModelSize:
    return model_size(tiny_config(*overrides), sequence_length)


@pytest.mark.parametrize(
    "overrides",
    [
        (KINDS["dropless"],),
        (KINDS["deepspeed"],),
        (KINDS["deepspeed"], "model.moe.use_residual=true", SHARED, *BIASED),
        (SHARED, "model.tie_word_embeddings=true"),
        (WIDE, "model.layer_pattern={kind: first_k_dense, k: 1}", "model.attention.qk_norm=none"),
        (WIDE, "model.layer_pattern={kind: all_dense}"),
        (
            *BIASED,
            SHARED,
            "model.moe.shared_expert_gate=true",
            "model.moe.router={kind: noisy_topk, bias: true}",
        ),
        (
            "model.feed_forward={kind: gelu, bias: true}",
            "model.norm={kind: layer_norm}",
            "model.final_norm=false",
        ),
        (
            "model.feed_forward={kind: product_swiglu}",
            "model.embedding_size=16",
            "model.position={kind: learned}",
        ),
        ("model.multi_token_prediction={}", "model.embedding_size=16", *BIASED),
    ],
)
def test_counts_without_tensors_are_those_of_the_real_model(overrides: tuple[str, ...]) -> None:
    size, model = counted(overrides), tiny_model(*overrides)
    assert size.parameters_stored == sum(parameter.numel() for parameter in model.parameters())
    padding = 128 - VOCAB_SIZE  # rows; the head's bias has one number for each
    numbers = [model.embedding.size] * (1 if model.config.tie_word_embeddings else 2) + [
        1
    ] * model.config.head_bias
    assert size.parameters_padding == padding * sum(numbers)
    of_experts = [
        parameter
        for name, parameter in model.named_parameters()
        if ".experts." in name or name[-3:] in (".b1", ".b2", ".b3")
    ]
    experts = sum(parameter.numel() for parameter in of_experts)
    assert size.parameters_experts == experts
    assert size.parameters_sharded == sum(
        parameter.numel()
        for parameter in model.parameters()
        if not getattr(parameter, "allreduce", True)
    )
    assert (
        size.parameters_active == size.parameters_total - experts + experts * 2 // 4
    )  # two of four experts
    assert (
        sum(size.components.values()) == size.parameters_total
        and sum(size.components_active.values()) == size.parameters_active
    )


def test_each_component_is_counted_by_hand() -> None:
    overrides = (
        "model.layer_pattern={kind: first_k_dense, k: 1}", WIDE, SHARED, *BIASED,
        "model.position={kind: learned}", "model.moe.router.bias=true",
        "model.multi_token_prediction={}",
    )  # fmt: skip
    # D 32, N 4, M 2, H 8 with RMSNorm of each head, four experts of width 32 and a shared one,
    # dense width 48, 256 positions.
    attention = (32 * 32 + 32) * 2 + (32 * 16 + 16) * 2 + 2 * 8 + 4
    expert, dense, router = 3 * 32 * 32 + 2 * 32 + 32, 3 * 32 * 48 + 2 * 48 + 32, 4 * 32 + 4
    norms = 32
    size, block = counted(overrides), 2 * norms + 64 * 32 + attention + 2 * norms + router
    assert size.components == {
        "embedding": 100 * 32,
        "positions": 256 * 32,
        "head": 100 * 32 + 100,
        "attention": 2 * attention,
        "shared_experts": expert,
        "routed_experts": 4 * expert,
        "routers": router,
        "dense_feed_forwards": dense,
        "norms": 5 * norms,
        "multi_token_prediction": block + 5 * expert,
    }
    assert size.components_active == size.components | {
        "routed_experts": 2 * expert,
        "multi_token_prediction": block + 3 * expert,
    }


@pytest.mark.parametrize("kind", KINDS)
def test_flops_by_hand(kind: str) -> None:
    size = counted((KINDS[kind],))
    attention, router, expert = 2 * 32 * 32 + 2 * 32 * 16, 4 * 32, 3 * 24 * 32
    scores_and_values = 2 * 32 * (1 + 16) / 2
    assert size.flops_per_token == 6 * (
        2 * (attention + router + 2 * expert + scores_and_values) + 100 * 32
    )


def test_vectors_lookups_and_padding_are_no_products() -> None:
    plain = counted(()).flops_per_token
    assert (
        counted(
            (*BIASED, "model.position={kind: learned}", "model.norm={kind: layer_norm}")
        ).flops_per_token
        == plain
    )
    assert counted(("model.tie_word_embeddings=true",)).flops_per_token == plain
    assert counted(("model.vocab_multiple=1000",)).flops_per_token == plain
    assert counted(("model.vocab_size=101",)).flops_per_token == plain + 6 * 32


def test_a_factorised_embedding_is_multiplied_on_both_ways() -> None:
    assert counted(("model.embedding_size=8",)).flops_per_token == counted(
        ()
    ).flops_per_token + 6 * (2 * 32 * 8 + 100 * (8 - 32))


def test_multi_token_prediction_costs_a_block_a_projection_and_a_head() -> None:
    one, two = (
        counted(("model.num_hidden_layers=1",)).flops_per_token,
        counted(("model.num_hidden_layers=2",)).flops_per_token,
    )
    extra = counted(("model.multi_token_prediction={}",)).flops_per_token - two
    assert extra == (two - one) + 6 * (2 * 32 * 32 + 100 * 32)


def test_a_window_cuts_the_keys_that_a_query_sees() -> None:
    everything, none = (
        counted((), 16).flops_per_token,
        counted((), 1).flops_per_token - 6 * 2 * 64 * 1,
    )
    assert everything - none == 6 * 2 * 64 * sum(range(1, 17)) / 16
    windowed = counted(("model.attention.sliding_window=4",), 16).flops_per_token
    assert windowed - none == 6 * 2 * 64 * (1 + 2 + 3 + 4 * 13) / 16
    by_turns = counted(
        ("model.attention.sliding_window=4", "model.attention.full_attention_every=2"), 16
    ).flops_per_token
    assert by_turns == (everything + windowed) / 2
    assert counted(("model.attention.sliding_window=400",), 16).flops_per_token == everything


def test_the_cache_of_a_window_layer_ends_with_its_window() -> None:
    full, by_turns = (
        tiny_config(),
        tiny_config("model.attention.sliding_window=4", "model.attention.full_attention_every=2"),
    )
    assert (
        cache_bytes(full, 1, 2) == cache_bytes(by_turns, 1, 2) == 2 * (2 * 2 * 8) * 2
    )  # layers x keys and values of two heads x bytes
    assert cache_bytes(full, 100, 2) == 100 * cache_bytes(full, 1, 2)
    assert cache_bytes(by_turns, 100, 2) == (100 + 4) * cache_bytes(full, 1, 2) // 2


@pytest.mark.parametrize(
    "precision,zero_stage,per_dense,per_expert",
    [
        ("fp32", 0, 4 + 4 + 8, 4 + 4 + 8),
        ("bf16", 1, 2 + 2 + 12 / 4, 2 + 2 + 12 / 2),
        ("bf16", 2, 2 + 14 / 4, 2 + 14 / 2),
        ("bf16", 3, 16 / 4, 16 / 2),
    ],
)
@pytest.mark.parametrize("biased", [False, True])
def test_state_is_sharded_over_the_ranks_that_hold_the_same_weights(
    precision: str, zero_stage: int, per_dense: float, per_expert: float, biased: bool
) -> None:
    """Four ranks, ep_size 2: dense weights are on four, each expert on two.

    Bytes per weight: value, gradient, AdamW with fp32 master.
    """
    size = counted(BIASED if biased else ())
    matrices = 2 * 4 * 3 * 32 * 32
    dense = size.parameters_stored - matrices  # the experts' biases stand on every rank
    expected = dense * per_dense + matrices / 2 * per_expert
    assert state_bytes_per_rank(size, precision, zero_stage, 4, 2, ADAMW)["total"] == pytest.approx(
        expected, abs=4
    )


@pytest.mark.parametrize("tp_size", [2, 4])
def test_a_rank_that_shares_tensors_holds_what_its_model_does(tp_size: int) -> None:
    overrides = [*SHARED_AND_TIED, f"parallel.tp_size={tp_size}"]
    recipe = load_recipe("debug", overrides)
    with torch.device("meta"):
        model = DecoderLM(recipe.model)
    whole = sum(parameter.numel() for parameter in model.parameters())
    model.share(TokenParts("", 1, tp_size), None, TensorParallel("", 1, tp_size))
    held = sum(parameter.numel() for parameter in model.parameters())
    size = model_size(recipe.model, 64, tp_size)
    state = state_bytes_per_rank(size, "fp32", 0, tp_size, 1, recipe.optimizer)
    assert held < 0.85 * whole
    assert state["weights"] == 4 * held
    # ZeRO 3 cuts everything: nothing is left to cut.
    sharded = [
        state_bytes_per_rank(each, "fp32", 3, tp_size, 1, recipe.optimizer)["total"]
        for each in (size, model_size(recipe.model, 64))
    ]
    assert sharded[0] == pytest.approx(sharded[1], abs=4)


def activations(*overrides: str) -> int:
    recipe = load_recipe("debug", ["model.vocab_size=512", *overrides])
    return activation_bytes(recipe.model, recipe.train, "fp32")


def test_checkpointing_lowers_the_activation_estimate() -> None:
    deep = "model.num_hidden_layers=8"
    assert activations(deep, "train.activation_checkpointing=true") < 0.5 * activations(deep)


def test_what_a_token_goes_through_raises_the_activation_estimate() -> None:
    plain = activations()
    gelu, product = (
        activations("model.feed_forward={kind: gelu}"),
        activations("model.feed_forward={kind: product_swiglu}"),
    )
    assert gelu < plain < product
    assert plain < activations(SHARED) < activations(SHARED, "model.multi_token_prediction={}")
    assert (
        activations("train.micro_batch_size=1")
        < plain
        < activations("model.attention.num_attention_heads=8")
    )


@pytest.mark.parametrize("path", DS_CONFIG_FILES, ids=lambda path: path.name)
def test_every_shipped_ds_config_resolves(path: Path) -> None:
    resolved = resolve_ds_config(
        read_ds_config(str(path)), str(path), load_recipe("debug"), "fp32", 4, 1
    )
    assert resolved["train_batch_size"] == 8
    assert '"auto"' not in json.dumps(resolved)


def test_shipped_files_are_found_at_all() -> None:
    assert {"debug", "quickstart"} <= set(recipe_names())
    assert "zero1.json" in {path.name for path in DS_CONFIG_FILES}
