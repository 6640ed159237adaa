"""What generation computes for few tokens in fewer operations is what it computes for many."""

from __future__ import annotations

import pytest
import torch

from pretrain.config.load import load_recipe
from pretrain.model.decoder import DecoderLM
from pretrain.model.init import initialize
from pretrain.model.moe.dropless import FEW_TOKENS, DroplessMoE
from pretrain.model.moe.router import Routing
from pretrain.model.norm import FEW_ELEMENTS, RMSNorm
from pretrain.model.positions.rope import (
    apply_rope,
    apply_rope_to_both,
    inverse_frequencies,
    rope_tables,
)

KINDS = {
    "plain": [],
    "shared": ["model.moe.num_shared_experts=1"],
    "sigmoid": ["model.moe.router={kind: sigmoid_topk, routed_scaling_factor: 2.5}"],
    "biases": ["model.feed_forward={kind: clamped_swiglu, bias: true}"],
    "not_gated": ["model.feed_forward={kind: gelu}"],
    "top_1": ["model.moe.top_k=1"],
}


def dropless_layer(overrides: list[str], tokens: int = 1) -> tuple[DroplessMoE, torch.Tensor]:
    """A layer with random weights and biases, and a token of each text [tokens, 1, D]."""
    model = DecoderLM(
        load_recipe("debug", ["model.vocab_size=64", "parallel.ep_size=1", *overrides]).model
    )
    initialize(model, seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2, generator=generator)
    layer = next(module for module in model.eval().modules() if isinstance(module, DroplessMoE))
    return layer, torch.randn(tokens, 1, model.config.hidden_size, generator=generator)


@pytest.mark.parametrize("tokens", [1, 2, 8, FEW_TOKENS, FEW_TOKENS + 1])
@pytest.mark.parametrize("kind", KINDS)
def test_the_experts_of_few_tokens_return_what_those_of_many_do(kind: str, tokens: int) -> None:
    layer, x_BSD = dropless_layer(KINDS[kind], tokens)
    with torch.no_grad():
        expected_BSD, statistics = layer(x_BSD)
    assert statistics is not None
    with torch.inference_mode():
        assert torch.equal(layer(x_BSD)[0], expected_BSD)


@pytest.mark.parametrize("tokens", [1, 8])
def test_with_other_experts_few_tokens_get_other_values(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x_BSD = dropless_layer([], tokens)
    with torch.inference_mode():
        expected_BSD = layer(x_BSD)[0]

        def swapped(x_TD: torch.Tensor, record: None) -> Routing:
            routing = type(layer.router).forward(layer.router, x_TD, record)
            return routing._replace(topk_ids_TK=(routing.topk_ids_TK + 1) % layer.num_experts)

        monkeypatch.setattr(layer.router, "forward", swapped)
        assert (layer(x_BSD)[0] - expected_BSD).abs().max() > 1e-3


@pytest.mark.parametrize("shape", [(1, 1, 256), (1, 1, 4, 64)])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_the_norm_of_few_numbers_is_the_norm_of_many(shape: tuple[int, ...], size: float) -> None:
    norm = RMSNorm(shape[-1], 1e-6)
    norm.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    few = size * torch.randn(shape, generator=torch.Generator().manual_seed(1))
    many = few.repeat(FEW_ELEMENTS // few.numel() + 1, *(1 for _ in shape[1:]))
    with torch.inference_mode():
        torch.testing.assert_close(norm(few), norm(many)[:1], rtol=1e-6, atol=0)
        norm.eps = 1e-2 * size**2
        torch.testing.assert_close(norm(few), norm(many)[:1], rtol=1e-6, atol=0)
        expected = norm(many)[:1]
        norm.eps *= 2
        assert (norm(few) / expected - 1).abs().max() > 1e-3


def test_queries_and_keys_of_a_token_turn_together_as_they_turn_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    q_BNSH, k_BMSH = (
        torch.randn(2, 4, 1, 8, generator=generator),
        torch.randn(2, 2, 1, 8, generator=generator),
    )
    tables = rope_tables(
        torch.tensor([[3], [7]]), inverse_frequencies(8, 100.0, torch.device("cpu"))
    )
    together = apply_rope_to_both(q_BNSH, k_BMSH, tables)
    assert torch.equal(together[0], apply_rope(q_BNSH, tables)) and torch.equal(
        together[1], apply_rope(k_BMSH, tables)
    )
    assert not torch.equal(together[0], apply_rope(q_BNSH.flip(1), tables))
