"""What a token's logits may depend on: nothing later, nothing in another document, and not on
whether a cache was used.
"""

from __future__ import annotations

import pytest
import torch

from tests.support.tiny_model import KINDS, VOCAB_SIZE, random_tokens, tiny_model

DROPPING = (
    "model.moe={kind: deepspeed, num_experts: 4, top_k: 2, moe_intermediate_size: 24,"
    " capacity_factor: 0.5, min_capacity: 0, causal: false}"
)


def changed_at(input_ids_BS: torch.Tensor, position: int) -> torch.Tensor:
    changed = input_ids_BS.clone()
    changed[:, position] = (changed[:, position] + 1) % VOCAB_SIZE
    return changed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("position", [1, 9, 15])
@torch.no_grad()
def test_no_logit_depends_on_a_later_token(kind: str, position: int) -> None:
    model, input_ids_BS = tiny_model(KINDS[kind]), random_tokens(2, 16)
    difference_S = (
        (model.logits(input_ids_BS) - model.logits(changed_at(input_ids_BS, position)))
        .abs()
        .amax(dim=(0, 2))
    )
    assert difference_S[:position].max() <= 1e-5
    assert difference_S[position:].min() > 1e-3  # the change is seen from its own position on


@torch.no_grad()
def test_capacity_drops_let_a_later_token_change_earlier_logits() -> None:
    """Why a recipe with drop_tokens must acknowledge it by ``causal: false``: second choices queue
    behind every first choice.
    """
    model, input_ids_BS = tiny_model(DROPPING), random_tokens(1, 32)
    logits = model.logits(input_ids_BS)
    earlier = [
        (logits - model.logits(changed_at(input_ids_BS, position)))[:, :position].abs().max()
        for position in range(16, 32)
    ]
    assert max(earlier) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_document_is_blind_to_the_one_before_it(kind: str) -> None:
    """Alone it starts at position 0, behind another one it does not: RoPE sees distances only, so
    the logits agree.
    """
    model, input_ids_BS = tiny_model(KINDS[kind]), random_tokens(2, 16)
    document_ids_BS = (torch.arange(16) >= 6).long().expand(2, 16)
    packed = model.logits(input_ids_BS, document_ids_BS)[:, 6:]
    torch.testing.assert_close(packed, model.logits(input_ids_BS[:, 6:]), atol=1e-5, rtol=1e-5)
    assert (packed - model.logits(input_ids_BS)[:, 6:]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", [[5, *[1] * 11], [16], [1, 6, 2, 7]])
@torch.no_grad()
def test_cached_logits_equal_the_full_forward_pass(kind: str, parts: list[int]) -> None:
    model, input_ids_BS = tiny_model(KINDS[kind]), random_tokens(3, 16)
    cache = model.new_cache(3, 16, "cpu", torch.float32)
    logits = torch.cat(
        [model.logits(part, cache=cache) for part in input_ids_BS.split(parts, dim=1)], dim=1
    )
    assert cache.length == 16
    torch.testing.assert_close(logits, model.logits(input_ids_BS), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_cache_that_lost_a_token_is_told_apart() -> None:
    model, input_ids_BS = tiny_model(), random_tokens(1, 8)
    cache = model.new_cache(1, 16, "cpu", torch.float32)
    model.logits(input_ids_BS[:, :6], cache=cache)
    cache.length -= 1
    late = model.logits(input_ids_BS[:, 6:], cache=cache)
    assert (late - model.logits(input_ids_BS)[:, 6:]).abs().max() > 1e-3


def test_padding_of_the_vocabulary_never_appears() -> None:
    model = tiny_model()
    assert model.head.weight.shape[0] == 128
    with torch.no_grad():
        assert model.logits(random_tokens(1, 4)).shape == (1, 4, VOCAB_SIZE)


def test_logits_are_fp32_in_a_bf16_model() -> None:
    model = tiny_model().to(torch.bfloat16)
    with torch.no_grad():
        assert model.logits(random_tokens(1, 4)).dtype == torch.float32


def test_a_tied_head_is_one_parameter_with_gradients_from_both_uses() -> None:
    tied, untied = tiny_model("model.tie_word_embeddings=true"), tiny_model()
    assert tied.head.weight is tied.embedding.weight
    assert [name for name, _ in tied.named_parameters() if "head" in name] == []
    with torch.no_grad():
        untied.head.weight.copy_(untied.embedding.weight)
    input_ids_BS, labels_BS = random_tokens(2, 8), random_tokens(2, 8, seed=1)
    for model in (tied, untied):
        model(input_ids_BS, labels_BS, 16.0).loss.backward()
    assert (
        tied.embedding.weight.grad is not None
        and untied.head.weight.grad is not None
        and untied.embedding.weight.grad is not None
    )
    assert untied.embedding.weight.grad.abs().max() > 0
    torch.testing.assert_close(
        tied.embedding.weight.grad,
        untied.head.weight.grad + untied.embedding.weight.grad,
        atol=1e-6,
        rtol=1e-5,
    )
