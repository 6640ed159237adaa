"""Attention kernels agree with the definition for every mask and head grouping; RoPE and RMSNorm agree with their formulas."""

from __future__ import annotations

import math

import pytest
import torch

from pretrain.model.attention.kernels import AttentionKernel, reference_attention, sdpa_attention
from pretrain.model.attention.mask import AttentionMask
from pretrain.model.norm import RMSNorm
from pretrain.model.positions.rope import apply_rope, rope_tables
from tests.model.tiny_model import random_tensor

B, M, S, H = 2, 2, 7, 8
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 2]])
MASKS = {
    "causal": (AttentionMask(), S),
    "documents": (AttentionMask(document_ids_BS=DOCUMENTS), S),
    "one_query_after_cache": (AttentionMask(offset=6), 1),
    "chunk_after_cache": (AttentionMask(offset=4), 3),
}


def attention_and_gradients(kernel: AttentionKernel, mask: AttentionMask, num_queries: int, ratio: int) -> list[torch.Tensor]:
    q, k, v = random_tensor(B, M * ratio, num_queries, H, seed=1), random_tensor(B, M, S, H, seed=2), random_tensor(B, M, S, H, seed=3)
    output = kernel(q, k, v, mask)
    return [output, *torch.autograd.grad((output * random_tensor(*output.shape, seed=4)).sum(), (q, k, v))]


@pytest.mark.parametrize("ratio", [1, 2, 4])
@pytest.mark.parametrize("name", MASKS)
def test_sdpa_equals_the_definition_with_gradients(name: str, ratio: int) -> None:
    mask, num_queries = MASKS[name]
    ours = attention_and_gradients(sdpa_attention, mask, num_queries, ratio)
    expected = attention_and_gradients(reference_attention, mask, num_queries, ratio)
    for one, other in zip(ours, expected):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


def test_a_mask_that_is_off_by_one_is_told_apart() -> None:
    shifted, _, _, _ = attention_and_gradients(sdpa_attention, AttentionMask(offset=5), 3, 2)
    expected, _, _, _ = attention_and_gradients(reference_attention, AttentionMask(offset=4), 3, 2)
    assert (shifted - expected).abs().max() > 1e-3


def test_reference_is_the_softmax_of_scaled_scores_over_visible_keys() -> None:
    q, k, v = random_tensor(B, 2 * M, S, H, seed=1), random_tensor(B, M, S, H, seed=2), random_tensor(B, M, S, H, seed=3)
    output = reference_attention(q, k, v, AttentionMask(document_ids_BS=DOCUMENTS))
    for b, head, query in [(0, 0, 2), (0, 1, 4), (1, 2, 5), (1, 3, 0)]:
        keys = [key for key in range(query + 1) if DOCUMENTS[b, key] == DOCUMENTS[b, query]]
        scores = torch.stack([q[b, head, query] @ k[b, head // 2, key] / math.sqrt(H) for key in keys])
        weights = scores.exp() / scores.exp().sum()
        expected = sum(weight * v[b, head // 2, key] for weight, key in zip(weights, keys))
        torch.testing.assert_close(output[b, head, query], expected, atol=1e-6, rtol=1e-5)


def test_rope_turns_each_pair_by_position_times_frequency() -> None:
    theta, positions = 100.0, torch.tensor([0, 3])
    x = random_tensor(1, 1, 2, 4).detach()
    turned = apply_rope(x, rope_tables(positions, 4, theta))
    torch.testing.assert_close(turned[0, 0, 0], x[0, 0, 0])
    for pair, frequency in enumerate((1.0, theta**-0.5)):
        complex_x = complex(x[0, 0, 1, pair], x[0, 0, 1, pair + 2])
        expected = complex_x * complex(math.cos(3 * frequency), math.sin(3 * frequency))
        assert complex(turned[0, 0, 1, pair], turned[0, 0, 1, pair + 2]) == pytest.approx(expected, rel=1e-5)


def test_rope_makes_scores_depend_on_distance_only() -> None:
    q, k = random_tensor(1, 1, 1, H, seed=1).detach(), random_tensor(1, 1, 1, H, seed=2).detach()

    def score(query: int, key: int) -> float:
        turned_q = apply_rope(q, rope_tables(torch.tensor([query]), H, 10000.0))
        return float((turned_q * apply_rope(k, rope_tables(torch.tensor([key]), H, 10000.0))).sum())

    assert score(5, 2) == pytest.approx(score(105, 102), abs=1e-4)
    assert abs(score(5, 2) - score(5, 3)) > 1e-3


def test_rms_norm_is_its_formula() -> None:
    norm = RMSNorm(6, eps=0.1)
    norm.weight.data = torch.arange(6.0)
    x = random_tensor(3, 6).detach()
    expected = x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * torch.arange(6.0)
    torch.testing.assert_close(norm(x), expected)
