"""The chunked cross-entropy against torch's own, its gradients, and what it holds in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pretrain.model import loss as loss_module
from pretrain.model.loss import (
    IGNORED_LABEL,
    LanguageModelHead,
    chunk_losses,
    plain_chunk_losses,
)
from tests.support.tiny_model import random_tensor

D, VOCAB, PADDED, TOKENS = 16, 50, 64, 37


def head_of(chunk_tokens: int, z_loss_weight: float = 0.0) -> LanguageModelHead:
    head = LanguageModelHead(
        D,
        padded_vocab_size=PADDED,
        vocab_size=VOCAB,
        chunk_tokens=chunk_tokens,
        z_loss_weight=z_loss_weight,
    )
    head.weight.data = random_tensor(PADDED, D, seed=1).detach()
    return head


def some_labels(ignored: bool = True) -> torch.Tensor:
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(2))
    if ignored:
        labels[::5] = IGNORED_LABEL
    return labels[None]


def plain_loss(
    x_BSD: torch.Tensor, weight_VD: torch.Tensor, labels_BS: torch.Tensor, z_loss_weight: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, nll) over the whole logits at once."""
    logits_TV = (x_BSD @ weight_VD[:VOCAB].T)[0]
    nll = functional.cross_entropy(
        logits_TV, labels_BS[0], ignore_index=IGNORED_LABEL, reduction="sum"
    )
    counted_T = labels_BS[0] != IGNORED_LABEL
    return nll + z_loss_weight * logits_TV.logsumexp(-1).square()[counted_T].sum(), nll


@pytest.mark.parametrize("chunk_tokens", [1, 8, 37, 1000])
@pytest.mark.parametrize("z_loss_weight", [0.0, 0.3])
@pytest.mark.parametrize("ignored", [False, True])
def test_loss_and_gradients_equal_plain_cross_entropy(
    chunk_tokens: int, z_loss_weight: float, ignored: bool
) -> None:
    head, x_BSD, labels_BS = (
        head_of(chunk_tokens, z_loss_weight),
        random_tensor(1, TOKENS, D),
        some_labels(ignored),
    )
    loss, nll = head(x_BSD, labels_BS)
    expected_loss, expected_nll = plain_loss(x_BSD, head.weight, labels_BS, z_loss_weight)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(nll, expected_nll, rtol=1e-6, atol=0)
    assert not nll.requires_grad
    ours = torch.autograd.grad(loss * 0.7, (x_BSD, head.weight))
    expected = torch.autograd.grad(expected_loss * 0.7, (x_BSD, head.weight))
    for one, other in zip(ours, expected):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_a_z_loss_of_another_weight_is_told_apart() -> None:
    x_BSD, labels_BS = random_tensor(1, TOKENS, D), some_labels()
    (ours,) = torch.autograd.grad(head_of(8, 0.3)(x_BSD, labels_BS)[0], x_BSD)
    (other,) = torch.autograd.grad(plain_loss(x_BSD, head_of(8).weight, labels_BS, 0.303)[0], x_BSD)
    assert (ours - other).abs().max() > 1e-4


@pytest.mark.parametrize("chunk_tokens", [8, 1000])
def test_padding_rows_and_ignored_tokens_get_exactly_no_gradient(chunk_tokens: int) -> None:
    head, x_BSD, labels_BS = head_of(chunk_tokens, 0.1), random_tensor(1, TOKENS, D), some_labels()
    x_gradient, weight_gradient = torch.autograd.grad(
        head(x_BSD, labels_BS)[0], (x_BSD, head.weight)
    )
    assert weight_gradient[VOCAB:].count_nonzero() == 0
    assert weight_gradient[:VOCAB].count_nonzero() == VOCAB * D
    ignored_T = labels_BS[0] == IGNORED_LABEL
    assert x_gradient[0, ignored_T].count_nonzero() == 0
    assert x_gradient[0, ~ignored_T].count_nonzero() > 0


def test_all_labels_ignored_is_a_loss_of_zero() -> None:
    head, x_BSD = head_of(8, 0.1), random_tensor(1, TOKENS, D)
    loss, nll = head(x_BSD, torch.full((1, TOKENS), IGNORED_LABEL))
    (gradient,) = torch.autograd.grad(loss, x_BSD)
    assert (loss.item(), nll.item(), gradient.count_nonzero().item()) == (0.0, 0.0, 0)


def test_no_token_at_all_is_a_loss_and_a_gradient_of_zero() -> None:
    head, x_BSD = head_of(8), random_tensor(1, TOKENS, D)[:, :0]
    loss, nll = head(x_BSD, some_labels()[:, :0])
    (gradient,) = torch.autograd.grad(loss, head.weight)
    assert (loss.item(), nll.item(), gradient.count_nonzero().item()) == (0.0, 0.0, 0)


@pytest.mark.parametrize("logit", [1e4, -1e4])
def test_extreme_logits_have_the_exact_loss(logit: float) -> None:
    logits_CV = random_tensor(3, VOCAB).detach()
    logits_CV[:, 4] = logit
    labels_C = torch.tensor([4, 5, IGNORED_LABEL])
    nll, _, gradient_CV = plain_chunk_losses(logits_CV, labels_C, 0.0)
    exact_CV = logits_CV.double().requires_grad_()
    expected = functional.cross_entropy(exact_CV, labels_C, reduction="sum")
    torch.testing.assert_close(nll.double(), expected, rtol=1e-6, atol=0)
    (expected_CV,) = torch.autograd.grad(expected, exact_CV)
    torch.testing.assert_close(gradient_CV.double(), expected_CV, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_cut_to_fit_the_cache_have_the_same_loss_and_gradient(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits_CV, labels_C = random_tensor(TOKENS, VOCAB).detach().to(dtype), some_labels()[0]
    whole = chunk_losses(logits_CV.clone(), labels_C, 0.1)
    monkeypatch.setattr(loss_module, "CACHED_LOGITS", 3 * VOCAB)
    cut = chunk_losses(logits_CV.clone(), labels_C, 0.1)
    assert torch.equal(cut[2], whole[2]) and cut[2].dtype == dtype
    torch.testing.assert_close(cut[:2], whole[:2], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_scaled_in_fp32(dtype: torch.dtype) -> None:
    head, x_BSD = head_of(1000).to(dtype), random_tensor(1, TOKENS, D).detach().to(dtype)
    x_BSD.requires_grad_()
    # A scale that neither dtype holds; 1e5 is above fp16's range.
    for scale in (0.7123456, 1e5):
        total = head(x_BSD, some_labels())[0]
        (plain,) = torch.autograd.grad(total, x_BSD, retain_graph=True)
        (scaled,) = torch.autograd.grad(total * scale, x_BSD)
        assert torch.equal(scaled, (plain.float() * torch.tensor(scale)).to(dtype))


def test_without_gradients_the_sums_are_the_same() -> None:
    head, x_BSD, labels_BS = head_of(8, 0.1), random_tensor(1, TOKENS, D), some_labels()
    with_gradients = head(x_BSD, labels_BS)
    with torch.no_grad():
        without = head(x_BSD, labels_BS)
    assert torch.equal(without[0], with_gradients[0]) and torch.equal(without[1], with_gradients[1])


@pytest.mark.parametrize("chunk_tokens", [8, 1000])
def test_bf16_gradients_are_close_to_those_of_fp32(chunk_tokens: int) -> None:
    head, x_BSD, labels_BS = head_of(chunk_tokens), random_tensor(1, TOKENS, D), some_labels()
    expected = torch.autograd.grad(head(x_BSD, labels_BS)[0], (x_BSD, head.weight))
    low_head = head.to(torch.bfloat16)
    low_x = x_BSD.detach().bfloat16().requires_grad_()
    loss, _ = low_head(low_x, labels_BS)
    assert loss.dtype == torch.float32
    for one, other in zip(torch.autograd.grad(loss, (low_x, low_head.weight)), expected):
        assert one.dtype == torch.bfloat16
        assert (one.float() - other).norm() / other.norm() < 0.03


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.numel = max(
            [
                self.numel,
                *(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)),
            ]
        )
        return result


def largest_tensor(chunk_tokens: int, tokens: int, vocab: int) -> int:
    head = LanguageModelHead(
        D, padded_vocab_size=vocab, vocab_size=vocab, chunk_tokens=chunk_tokens, z_loss_weight=0.1
    )
    head.weight.data = random_tensor(vocab, D, seed=1).detach()
    x_BSD, labels_BS = random_tensor(1, tokens, D), torch.zeros(1, tokens, dtype=torch.int64)
    with LargestTensor() as largest:
        head(x_BSD, labels_BS)[0].backward()
    return largest.numel


def test_no_tensor_is_larger_than_one_chunk_of_logits() -> None:
    chunk_tokens, tokens, vocab = 32, 256, 512
    assert largest_tensor(chunk_tokens, tokens, vocab) == chunk_tokens * vocab
    assert (
        largest_tensor(tokens, tokens, vocab) == tokens * vocab
    )  # what the measurement sees without chunks
