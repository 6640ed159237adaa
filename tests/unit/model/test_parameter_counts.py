"""The published models' exact parameter counts, each without a tensor."""

from __future__ import annotations

import time

import pytest

from pretrain.config.load import load_recipe
from pretrain.core.shipped import recipe_names
from pretrain.model.sizes import ModelSize, model_size

# Recipe -> (parameters in all, active parameters of a token). The totals, the first four active
# counts and the last one are published or were counted on the model's own code; the other active
# counts follow from the total by hand: it less the routed experts that a token does not choose.
COUNTS = {
    "h64lm": (249_720_576, 122_318_592),
    "khanh_692m": (692_244_360, 339_707_784),
    "fastgpt_moe": (25_731_072, 19_439_616),
    "p828_60m": (60_889_356, 56_950_028),
    "h64lm_tied": (225_144_576, 225_144_576 - 3 * 6 * 3 * 768 * 3072),
    "p828_800m": (811_968_576, 811_968_576 - 24 * 6 * 3 * 1536 * 512),
    "p828_800m_as_written": (7_101_151_488, 7_101_151_488 - 24 * 6 * 31_475_200),
    "mixtral_8x7b": (46_702_792_704, 46_702_792_704 - 32 * 6 * 3 * 4096 * 14336),
    "olmoe_1b_7b": (6_919_161_856, 6_919_161_856 - 16 * 56 * 3 * 2048 * 1024),
    "qwen3_30b_a3b": (30_532_122_624, 30_532_122_624 - 48 * 120 * 3 * 2048 * 768),
    "gpt_oss_20b": (20_914_757_184, 20_914_757_184 - 24 * 28 * (3 * 2880 * 2880 + 3 * 2880)),
    "deepseek_moe_16b": (16_375_728_128, 16_375_728_128 - 27 * 58 * 3 * 2048 * 1408),
    "deepseek_v3": (671_026_404_352, 671_026_404_352 - 58 * 248 * 3 * 7168 * 2048),
    "peer_mla_16b": (16_267_594_496, 163_433_216),
}


def size_of(name: str, *overrides: str) -> ModelSize:
    recipe = load_recipe(name, list(overrides))
    return model_size(recipe.model, recipe.train.sequence_length)


@pytest.mark.parametrize("name", COUNTS)
def test_the_count_is_exact(name: str) -> None:
    size = size_of(name)
    assert (size.parameters_total, size.parameters_active) == COUNTS[name]


@pytest.mark.parametrize("name", sorted(set(recipe_names()) - set(COUNTS)))
def test_every_other_shipped_recipe_builds(name: str) -> None:
    vocab_size = load_recipe(name).data.tokenizer.vocab_size
    size = size_of(name, f"model.vocab_size={vocab_size}")
    assert 0 < size.parameters_active < size.parameters_total


def test_padding_is_not_counted() -> None:
    """50,000 and 100,000 are no multiples of 64: 48 and 32 rows more are held."""
    assert size_of("khanh_692m").parameters_padding == 48 * (1024 + 1024 + 1)
    assert size_of("fastgpt_moe").parameters_padding == 32 * 128
    assert (
        size_of("fastgpt_moe", "model.tie_word_embeddings=false").parameters_total == 38_531_072
    )  # as its code counts


def test_a_feature_less_is_another_count() -> None:
    """The counts are close to none of the neighbouring architectures."""
    assert size_of("p828_60m", "model.attention.sinks=false").parameters_total == 60_889_356 - 8
    assert size_of("p828_60m", "model.moe.router.bias=false").parameters_total == 60_889_356 - 4
    assert size_of("p828_60m", "model.attention.qk_norm=head").parameters_total == 60_889_484
    assert size_of("khanh_692m", "model.final_norm=true").parameters_total == 692_244_360 + 2048


def test_deepseek_v3s_block_of_multi_token_prediction_is_not_in_its_count() -> None:
    """As much as one of its last layers, a projection and two norms: embedding and head are the
    model's own.
    """
    small, with_block = (
        size_of("deepseek_v3", "model.num_hidden_layers=4", *more)
        for more in ((), ("model.multi_token_prediction={}",))
    )
    attention = (
        7168 * 1536
        + 1536
        + 1536 * 128 * 192
        + 7168 * 576
        + 512
        + 512 * 128 * 256
        + 128 * 128 * 7168
    )
    block = attention + 257 * 3 * 7168 * 2048 + 256 * 7168 + 2 * 7168
    assert (
        with_block.parameters_total - small.parameters_total
        == block + 2 * 7168 * 7168 + 2 * 7168
        == 11_610_060_800
    )
    assert (
        small.components["attention"] == 4 * attention
        and small.components["multi_token_prediction"] == 0
    )


def test_thousands_of_native_experts_are_counted_in_seconds() -> None:
    """DeepSpeed's layer copies each of its experts: 6,144 of them would take ten seconds."""
    native = ("model.moe.kind=deepspeed", "model.moe.gate=router", "model.moe.drop_tokens=false")
    started = time.process_time()
    for name in ("qwen3_30b_a3b", "gpt_oss_20b"):
        assert size_of(name, *native).parameters_total == COUNTS[name][0]
    assert time.process_time() - started < 4
