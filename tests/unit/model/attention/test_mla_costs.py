"""What multi-head latent attention costs, in its cache and in products, and what the rest of the
project makes of it.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pretrain.config.load import load_recipe
from pretrain.core.errors import ConfigError
from pretrain.evaluation.generation.generate import generate, native_next_logits
from pretrain.evaluation.generation.sampling import Sampling
from pretrain.evaluation.generation.speculative import NativeDrafting, generate_with_drafts
from pretrain.export.targets import choose_target
from pretrain.model.attention.mask import AttentionMask
from pretrain.model.attention.mla import MultiHeadLatentAttention
from pretrain.model.attention.scores import Scores
from pretrain.model.decoder import DecoderLM
from pretrain.model.sizes import cache_bytes, model_size
from pretrain.run.memory import activation_bytes
from tests.support.tiny_mla import DENSE, B, C, D, H, N, Q, R, S, V, build, latent, layer_of
from tests.support.tiny_model import random_tokens, tiny_config, tiny_model

# --- what it costs --------------------------------------------------------------------------------


def products(attention: MultiHeadLatentAttention, S: int, offset: int, form: str) -> int:
    """FLOPs of the matrix products of one form, as they are run, on the meta device."""
    q = torch.empty(1, N, S, H + R, device="meta")
    latents = torch.empty(1, 1, offset + S, C + R, device="meta")
    with FlopCounterMode(display=False) as counter:
        getattr(attention, form)(q, latents, Scores(AttentionMask(offset), 1.0))
    return int(counter.get_total_flops())


def test_the_form_that_multiplies_less_is_chosen() -> None:
    with torch.device("meta"):
        attention = (
            DecoderLM(tiny_config(*DENSE, latent(), "model.attention.kernel=reference"))
            .layers[0]
            .attention
        )
    assert isinstance(attention, MultiHeadLatentAttention)
    attention.kernel = (
        build("kernel: reference").layers[0].attention.kernel
    )  # on the meta device every kernel is sdpa
    chosen = set()
    for tokens, offset in (
        (1, 0),
        (1, 1),
        (1, 30),
        (3, 5),
        (8, 100),
        (9, 1),
        (40, 0),
        (40, 8),
        (40, 400),
    ):
        absorbed, plain = (
            products(attention, tokens, offset, form) for form in ("_absorbed", "_plain")
        )
        assert attention._absorbing_is_cheaper(tokens, offset + tokens) == (absorbed < plain), (
            tokens,
            offset,
        )
        chosen.add(absorbed < plain)
    assert chosen == {True, False}


def test_deepseek_v3_absorbs_steps_and_short_chunks() -> None:
    recipe = load_recipe("deepseek_v3", ["model.num_hidden_layers=4"])
    with torch.device("meta"):
        attention = DecoderLM(recipe.model, ep_size=256).layers[0].attention
    assert isinstance(attention, MultiHeadLatentAttention)
    cheaper = attention._absorbing_is_cheaper
    assert cheaper(1, 2) and cheaper(2, 4096) and cheaper(128, 4096)
    assert not cheaper(1, 1) and not cheaper(4096, 4096) and not cheaper(256, 4096)


def measured_cache(model: DecoderLM, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of all tensors of a cache."""
    layers = model.new_cache(1, tokens, "cpu", dtype).layers
    return sum(
        tensor.numel() * tensor.element_size()
        for layer in layers
        for tensor in vars(layer).values()
    )


def test_the_cache_keeps_a_latent_and_a_key_a_token_where_grouped_queries_keep_all_key_heads() -> (
    None
):
    ours, grouped = (
        build(),
        tiny_model(
            *DENSE,
            f"model.attention={{kind: gqa, num_attention_heads: {N}, num_key_value_heads: {N},"
            f" head_dim: {H + R}}}",
        ),
    )
    for model, numbers in ((ours, C + R), (grouped, 2 * N * (H + R))):
        assert (
            measured_cache(model, 50, torch.bfloat16)
            == cache_bytes(model.config, 50, 2)
            == 2 * 50 * numbers * 2
        )
        assert model.config.attention.cached_per_token == numbers
    cache = ours.new_cache(B, S, "cpu", torch.float32)
    with torch.no_grad():
        ours.logits(random_tokens(B, 5), cache=cache)
    assert [
        layer.latents[:, :, :5].any().item() and not layer.latents[:, :, 5:].any()
        for layer in cache.layers
    ] == [True, True]


def test_deepseek_v3_caches_70_kb_a_token_and_its_heads_would_be_57_times_as_much() -> None:
    model = load_recipe("deepseek_v3").model
    assert cache_bytes(model, 1, 2) == 61 * (512 + 64) * 2 == 70_272
    all_heads = model.attention.score_dim + model.attention.value_dim
    assert round(all_heads / model.attention.cached_per_token) == 71
    assert (
        round(2 * model.attention.value_dim / model.attention.cached_per_token) == 57
    )  # multi-head attention with heads of 128


@pytest.mark.parametrize("options", ["", "q_lora_rank: null", "bias: all, sinks: true"])
def test_parameters_and_flops_by_hand(options: str) -> None:
    size = model_size(tiny_config(*DENSE, latent(options)), S)
    queries = D * N * (H + R) if "null" in options else D * Q + Q * N * (H + R)
    matrices = queries + D * (C + R) + C * N * (H + V) + N * V * D
    vectors = C + (0 if "null" in options else Q) + (Q + C + R + D + N if "bias" in options else 0)
    assert size.components["attention"] == 2 * (matrices + vectors)
    scores_and_values = N * (H + R + V) * (1 + S) / 2
    assert size.flops_per_token == 6 * (2 * (matrices + 3 * D * 24 + scores_and_values) + 100 * D)


def test_training_keeps_keys_and_values_of_all_heads() -> None:
    """What is cached is small, what is trained is not."""
    train = load_recipe("debug").train
    wide, narrow = (
        activation_bytes(tiny_config(*DENSE, latent(f"qk_nope_head_dim: {size}")), train, "fp32")
        for size in (16, 8)
    )
    tokens, layers, width = train.micro_batch_size * train.sequence_length, 2, 4
    assert (
        wide - narrow == layers * tokens * width * 2 * 2 * N * 8
    )  # queries and keys, each before and after its rotation


# --- the rest of the project ----------------------------------------------------------------------


def test_weights_start_with_the_spread_the_recipe_says() -> None:
    attention = layer_of(
        tiny_model(
            *DENSE,
            latent("kv_lora_rank: 96"),
            "model.initializer_range=0.02",
            "model.hidden_size=256",
        )
    )
    for name, parameter in attention.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter))
        else:
            expected = 0.02 / math.sqrt(2 * 2) if name == "o_proj.weight" else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.06), name


def test_drafts_of_multi_token_prediction_change_no_greedy_token() -> None:
    model = tiny_model(
        *DENSE, latent(), "model.multi_token_prediction={}", "model.initializer_range=0.1"
    ).eval()
    prompt, greedy = random_tokens(1, 9)[0].tolist(), Sampling(greedy=True)
    plain = generate(
        native_next_logits(model, 50, torch.device("cpu")), prompt, greedy, -1, range(40)
    )
    drafted, counts = generate_with_drafts(
        NativeDrafting(model, 50, torch.device("cpu")), prompt, greedy, -1, range(40)
    )
    assert drafted == plain and counts.drafted > 0 and len(set(plain)) > 3


def test_an_export_without_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="model.attention.kind is mla"):
        choose_target(load_recipe("debug", [latent()]), "qwen3_moe")
