"""What a recipe has to say for muP, what is refused, and how widths grow together."""

from __future__ import annotations

import pytest

from pretrain.config.load import load_recipe
from pretrain.core.errors import ConfigError
from pretrain.model.widths import base_model, initial_router_std, scaled_widths, widths, with_widths

NAMED = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "moe_intermediate_size": 16,
}


def mup(**base: int | None) -> str:
    given = {name: size for name, size in {**NAMED, **base}.items() if size is not None}
    return (
        "model.initialization={kind: mup, base:"
        f" {{{', '.join(f'{name}: {size}' for name, size in given.items())}}}}}"
    )


def test_a_base_with_every_width_that_grows_is_accepted() -> None:
    model = load_recipe("debug", [mup()]).model
    assert widths(base_model(model, model.initialization.base)) == {**NAMED, "head_dim": 8}
    assert initial_router_std(model) == 0.01
    assert initial_router_std(load_recipe("debug").model) == 0.02


@pytest.mark.parametrize(
    "overrides,sentence",
    [
        (
            [mup(moe_intermediate_size=None)],
            r"base\.moe_intermediate_size is missing: give the base model's, or 32 as here",
        ),
        ([mup(num_key_value_heads=None)], r"base\.num_key_value_heads is missing"),
        (
            [mup(), "model.layer_pattern={kind: every_nth, n: 2}", "model.intermediate_size=64"],
            r"base\.intermediate_size is missing",
        ),
        (
            [mup(), "model.moe.num_shared_experts=1", "model.moe.shared_intermediate_size=8"],
            r"base\.shared_intermediate_size is missing",
        ),
        ([mup(kv_lora_rank=4)], r"base\.kv_lora_rank is given, but the model has no kv_lora_rank"),
        (
            [mup(num_key_value_heads=2, num_attention_heads=3)],
            r"base\.num_attention_heads \(3\) is no multiple of num_key_value_heads \(2\)",
        ),
        (
            [mup(), "model.moe={kind: peer, product_key_sizes: [4, 4], query_dim: 8}"],
            r"does not know model\.moe\.kind=peer",
        ),
        (
            [mup(), "optimizer={kind: sgd, learning_rate: 0.1}"],
            r"not for optimizer\.kind=sgd: use adamw",
        ),
        (
            [mup(), "model.tie_word_embeddings=true", "model.final_norm=false"],
            r"model\.tie_word_embeddings scales the logits by the final norm",
        ),
        (
            [mup(), "model.embedding_size=8", "model.final_norm=false"],
            r"model\.embedding_size scales the logits by the final norm",
        ),
        (
            [mup(hidden_siz=4)],
            r"unknown field 'model\.initialization\.base\.hidden_siz': did you mean 'hidden_size'",
        ),
    ],
)
def test_what_muP_cannot_do_is_refused_by_name(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load_recipe("debug", overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["optimizer={kind: sgd, learning_rate: 0.1}"],
        ["model.tie_word_embeddings=true", "model.final_norm=false"],
    ],
)
def test_the_standard_kind_refuses_none_of_it(overrides: list[str]) -> None:
    load_recipe("debug", overrides)


def test_proportions_are_kept_and_attention_grows_by_heads_or_by_their_size() -> None:
    model = load_recipe("debug").model
    more = {
        "hidden_size": 96,
        "moe_intermediate_size": 96,
        "num_attention_heads": 12,
        "num_key_value_heads": 6,
        "head_dim": 8,
    }
    assert scaled_widths(model, 96) == more
    larger = scaled_widths(model, 96, "head_dim")
    assert larger == {**more, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24}
    assert widths(with_widths(model, larger)) == larger


def test_a_width_that_would_be_broken_is_refused() -> None:
    with pytest.raises(
        ConfigError,
        match=r"at hidden_size 8 the model's num_key_value_heads would be 0\.5.*grow by head_dim",
    ):
        scaled_widths(load_recipe("debug").model, 8)
