"""Cross-entropy of the language-model head, in chunks over tokens.

The full [T, V] logits are never in memory at once. The gradients with respect to the hidden states
and the head's weight are computed in the forward pass, chunk by chunk, while a chunk's logits
exist; the backward pass only scales them. The idea is that of Hsu et al. 2024 (Liger Kernel), in
plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

# Logits [C, V], labels [C] and the weight of the z-loss -> nll, loss and gradient [C, V].
ChunkLosses = Callable[
    [torch.Tensor, torch.Tensor, float], tuple[torch.Tensor, torch.Tensor, torch.Tensor]
]
# The value that torch's cross-entropy ignores by default.
IGNORED_LABEL = -100


def _chunk_sums(
    logits_CV: torch.Tensor,
    log_probs_CV: torch.Tensor,
    labels_C: torch.Tensor,
    z_loss_weight: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Summed nll and loss of a chunk, fp32, and its logsumexp [C, 1] if there is a z-loss."""
    counted_C1 = (labels_C != IGNORED_LABEL)[:, None]
    # gather needs a valid index for ignored tokens too; what it reads is masked out below.
    labels_C1 = labels_C.clamp_min(0)[:, None]
    label_log_probs_C1 = log_probs_CV.gather(1, labels_C1).masked_fill(~counted_C1, 0.0)
    nll = -label_log_probs_C1.sum()
    if not z_loss_weight:
        return nll, nll, None
    # logsumexp = logit - log_prob, taken at the label: no second reduction over V.
    logsumexp_C1 = (logits_CV.gather(1, labels_C1) - label_log_probs_C1).masked_fill(
        ~counted_C1, 0.0
    )
    return nll, nll + z_loss_weight * logsumexp_C1.square().sum(), logsumexp_C1


def _chunk_losses(
    logits_CV: torch.Tensor, labels_C: torch.Tensor, z_loss_weight: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Summed nll and loss of a chunk of C tokens, and d loss / d logits [C, V]; all fp32."""
    log_probs_CV = logits_CV.log_softmax(dim=-1)
    nll, loss, logsumexp_C1 = _chunk_sums(logits_CV, log_probs_CV, labels_C, z_loss_weight)
    # d nll / d logits = softmax - one_hot(label). In place: [C, V] is the largest tensor here.
    gradient_CV = log_probs_CV.exp_()
    if logsumexp_C1 is not None:
        # d logsumexp^2 / d logits = 2 logsumexp * softmax, so it scales the softmax term alone and
        # has to come before the one-hot is subtracted.
        gradient_CV.mul_(1.0 + 2.0 * z_loss_weight * logsumexp_C1)
    # scatter needs a valid index too.
    labels_C1 = labels_C.clamp_min(0)[:, None]
    gradient_CV.scatter_add_(1, labels_C1, torch.full_like(labels_C1, -1.0, dtype=torch.float32))
    return nll, loss, gradient_CV.mul_((labels_C != IGNORED_LABEL)[:, None])


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and nll of a whole micro batch; saves gradients instead of logits."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        x_TD,
        weight_VD,
        bias_V,
        labels_T,
        vocab_size,
        chunk_tokens,
        z_loss_weight,
        chunk_losses,
        needs_gradient,
    ):
        # Padding rows of the vocabulary take no part: they get no probability and no gradient.
        used_VD = weight_VD[:vocab_size]
        used_V = None if bias_V is None else bias_V[:vocab_size]
        nll = x_TD.new_zeros((), dtype=torch.float32)
        loss = torch.zeros_like(nll)
        if needs_gradient:
            # The weight's gradient sums over all chunks, so it is accumulated in fp32. Hidden
            # states are written once per chunk and stay in their own dtype.
            x_gradient_TD = torch.empty_like(x_TD)
            weight_gradient_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
            bias_gradient_V = (
                None if bias_V is None else torch.zeros_like(bias_V, dtype=torch.float32)
            )
        for start in range(0, x_TD.shape[0], chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            x_CD = x_TD[chunk]
            logits_CV = functional.linear(x_CD, used_VD, used_V).float()
            if needs_gradient:
                chunk_nll, chunk_loss, gradient_CV = chunk_losses(
                    logits_CV, labels_T[chunk], z_loss_weight
                )
            else:
                chunk_nll, chunk_loss, _ = _chunk_sums(
                    logits_CV, logits_CV.log_softmax(dim=-1), labels_T[chunk], z_loss_weight
                )
            nll += chunk_nll
            loss += chunk_loss
            if needs_gradient:
                # The bias sums the gradient before it is rounded to the model's dtype.
                if bias_gradient_V is not None:
                    bias_gradient_V[:vocab_size] += gradient_CV.sum(dim=0)
                gradient_CV = gradient_CV.to(x_TD.dtype)
                x_gradient_TD[chunk] = gradient_CV @ used_VD
                weight_gradient_VD[:vocab_size] += gradient_CV.T @ x_CD
        if needs_gradient:
            ctx.save_for_backward(x_gradient_TD, weight_gradient_VD, bias_gradient_V)
            ctx.weight_dtype = weight_VD.dtype
        # Only ``loss`` carries a gradient; without the mark autograd would ask for one of ``nll``.
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    def backward(ctx, grad_loss, _grad_nll):  # type: ignore[no-untyped-def]
        x_gradient_TD, weight_gradient_VD, bias_gradient_V = ctx.saved_tensors
        # Scaled in fp32: in fp16 the scale (loss scale / tokens) is what keeps small gradients from
        # underflowing.
        x_gradient = (x_gradient_TD.float() * grad_loss).to(x_gradient_TD.dtype)
        weight_gradient = (weight_gradient_VD * grad_loss).to(ctx.weight_dtype)
        bias_gradient = (
            None if bias_gradient_V is None else (bias_gradient_V * grad_loss).to(ctx.weight_dtype)
        )
        return x_gradient, weight_gradient, bias_gradient, None, None, None, None, None, None


class LanguageModelHead(nn.Module):
    """Projection to the vocabulary.

    Rows from ``vocab_size`` on are padding: they get no probability and no gradient.
    """

    def __init__(
        self,
        size: int,
        *,
        padded_vocab_size: int,
        vocab_size: int,
        chunk_tokens: int,
        z_loss_weight: float,
        has_bias: bool = False,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(padded_vocab_size, size))
        self.bias = nn.Parameter(torch.zeros(padded_vocab_size)) if has_bias else None
        self.vocab_size = vocab_size
        self.chunk_tokens = chunk_tokens
        self.z_loss_weight = z_loss_weight
        # An attribute, so that torch.compile can take its place.
        self.chunk_losses: ChunkLosses = _chunk_losses

    def forward(
        self, x_BSE: torch.Tensor, labels_BS: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Logits [B, S, vocab_size] in fp32 without labels; (loss, nll) with labels [B, S].

        Both are fp32 scalars in nats, summed over the tokens whose label is not -100. ``nll`` is
        the plain negative log-likelihood, without gradient; ``loss`` adds ``z_loss_weight *
        sum(logsumexp^2)`` (PaLM, Chowdhery et al. 2022, section 5) and carries the gradient.
        """
        if labels_BS is None:
            bias = None if self.bias is None else self.bias[: self.vocab_size]
            return functional.linear(x_BSE, self.weight[: self.vocab_size], bias).float()
        x_TE = x_BSE.reshape(-1, x_BSE.shape[-1])
        # Inside an autograd function the gradient mode is always off, so it is asked for here.
        needs_gradient = torch.is_grad_enabled()
        # The tokens of all sequences are one batch of T = B * S from here on.
        labels_T = labels_BS.reshape(-1)
        sizes = self.vocab_size, self.chunk_tokens, self.z_loss_weight
        return _ChunkedCrossEntropy.apply(
            x_TE, self.weight, self.bias, labels_T, *sizes, self.chunk_losses, needs_gradient
        )
