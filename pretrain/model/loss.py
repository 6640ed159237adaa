"""Cross-entropy of the language-model head, in chunks over tokens.

The full [T, V] logits are never in memory at once. The gradients with respect to the hidden states
and the head's weight are computed in the forward pass, chunk by chunk, while a chunk's logits
exist; the backward pass only scales them. The idea is that of Hsu et al. 2024 (Liger Kernel), in
plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from pretrain.model.kernels.selection import use_fused
from pretrain.model.sharded_loss import IGNORED_LABEL, sharded_chunk_losses
from pretrain.model.tensor_shards import cut
from pretrain.model.token_parallel import TensorParallel

# Logits [C, V], labels [C] and the weight of the z-loss -> nll, loss and gradient [C, V] in the
# logits' dtype, and perhaps in their memory.
ChunkLosses = Callable[
    [torch.Tensor, torch.Tensor, float], tuple[torch.Tensor, torch.Tensor, torch.Tensor]
]
# Logits whose loss is computed at once on a CPU: 8 MB in fp32, of an L3 cache of some tens.
CACHED_LOGITS = 2**21


def plain_chunk_losses(
    logits_CV: torch.Tensor, labels_C: torch.Tensor, z_loss_weight: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Summed nll and loss of a chunk of C tokens, and d loss / d logits [C, V]; all fp32.

    With one exponential per logit: the largest probability of a token is exp(0) / sum, so it is
    also the sum that the nll needs.
    """
    counted_C1 = (labels_C != IGNORED_LABEL)[:, None]
    # gather and scatter need a valid index for ignored tokens too; what it reads is masked out
    # below.
    labels_C1 = labels_C.clamp_min(0)[:, None]
    logits_CV = logits_CV.float()
    gradient_CV = logits_CV.softmax(dim=-1)
    log_sum_C1 = -gradient_CV.amax(dim=-1, keepdim=True).log()
    largest_C1 = logits_CV.amax(dim=-1, keepdim=True)
    # Not as logsumexp - logit: both may be large, and their difference would lose digits.
    nll_C1 = log_sum_C1 - (logits_CV.gather(1, labels_C1) - largest_C1)
    nll = loss = nll_C1.masked_fill(~counted_C1, 0.0).sum()
    # d nll / d logits = softmax - one_hot(label). In place: [C, V] is the largest tensor here.
    weight_C1 = counted_C1.float()
    if z_loss_weight:
        logsumexp_C1 = (largest_C1 + log_sum_C1).masked_fill(~counted_C1, 0.0)
        loss = nll + z_loss_weight * logsumexp_C1.square().sum()
        # d logsumexp^2 / d logits = 2 logsumexp * softmax, so it scales the softmax term alone and
        # has to come before the one-hot is subtracted.
        gradient_CV.mul_(weight_C1 * (1.0 + 2.0 * z_loss_weight * logsumexp_C1))
    else:
        gradient_CV.mul_(weight_C1)
    return nll, loss, gradient_CV.scatter_add_(1, labels_C1, -weight_C1)


def chunk_losses(
    logits_CV: torch.Tensor, labels_C: torch.Tensor, z_loss_weight: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`plain_chunk_losses` as it is cheapest on the logits' device.

    The gradient has the logits' dtype, and may be in their memory.
    """
    if use_fused(logits_CV):
        from pretrain.model.kernels.loss_triton import chunk_losses_

        nll_C, loss_C = chunk_losses_(logits_CV, labels_C, z_loss_weight, IGNORED_LABEL)
        return nll_C.sum(), loss_C.sum(), logits_CV
    if not logits_CV.is_cpu or torch.compiler.is_compiling():
        nll, loss, gradient_CV = plain_chunk_losses(logits_CV, labels_C, z_loss_weight)
        return nll, loss, gradient_CV.to(logits_CV.dtype)
    # A few rows at a time, so that their fp32 values stay in a CPU's cache.
    rows = max(CACHED_LOGITS // logits_CV.shape[1], 1)
    losses = []
    for block_CV, block_C in zip(logits_CV.split(rows), labels_C.split(rows), strict=True):
        *sums, gradient_CV = plain_chunk_losses(block_CV, block_C, z_loss_weight)
        block_CV.copy_(gradient_CV)
        losses.append(torch.stack(sums))
    nll, loss = torch.stack(losses).sum(dim=0)
    return nll, loss, logits_CV


def _add_product(
    total_VD: torch.Tensor, gradient_CV: torch.Tensor, x_CD: torch.Tensor, is_first: bool
) -> None:
    """Add a chunk's gradient of the weight to ``total_VD``; the first is written over it."""
    if total_VD.dtype == gradient_CV.dtype:
        total_VD.addmm_(gradient_CV.T, x_CD, beta=0 if is_first else 1)
    elif is_first:
        total_VD.copy_(gradient_CV.T @ x_CD)
    else:
        total_VD += gradient_CV.T @ x_CD


def _scaled(gradient: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``gradient * scale`` in ``dtype``, multiplied in fp32.

    In fp16 the scale (loss scale / tokens) is what keeps small gradients from underflowing.
    """
    # A CPU's kernel multiplies by an fp32 scalar in fp32; CUDA's would round the scalar first.
    if gradient.is_cpu and gradient.dtype == dtype:
        return gradient * scale
    return (gradient.float() * scale).to(dtype)


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
            # The weight's gradient sums over all chunks, so with several it is accumulated in fp32.
            # Hidden states are written once per chunk and stay in their own dtype.
            x_gradient_TD = torch.empty_like(x_TD)
            several = x_TD.shape[0] > chunk_tokens
            weight_gradient_VD = torch.empty_like(
                weight_VD, dtype=torch.float32 if several else None
            )
            # The first chunk is written over the rest.
            weight_gradient_VD[vocab_size if x_TD.shape[0] else 0 :].zero_()
            bias_gradient_V = (
                None if bias_V is None else torch.zeros_like(bias_V, dtype=torch.float32)
            )
        for start in range(0, x_TD.shape[0], chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            x_CD = x_TD[chunk]
            logits_CV = functional.linear(x_CD, used_VD, used_V)
            # The bias sums the gradient before it is rounded to the model's dtype.
            if bias_V is not None:
                logits_CV = logits_CV.float()
            chunk_nll, chunk_loss, gradient_CV = chunk_losses(
                logits_CV, labels_T[chunk], z_loss_weight
            )
            nll += chunk_nll
            loss += chunk_loss
            if needs_gradient:
                if bias_gradient_V is not None:
                    bias_gradient_V[:vocab_size] += gradient_CV.sum(dim=0)
                gradient_CV = gradient_CV.to(x_TD.dtype)
                torch.mm(gradient_CV, used_VD, out=x_gradient_TD[chunk])
                _add_product(weight_gradient_VD[:vocab_size], gradient_CV, x_CD, start == 0)
        if needs_gradient:
            ctx.save_for_backward(x_gradient_TD, weight_gradient_VD, bias_gradient_V)
            ctx.weight_dtype = weight_VD.dtype
        # Only ``loss`` carries a gradient; without the mark autograd would ask for one of ``nll``.
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    def backward(ctx, grad_loss, _grad_nll):  # type: ignore[no-untyped-def]
        x_gradient_TD, weight_gradient_VD, bias_gradient_V = ctx.saved_tensors
        x_gradient = _scaled(x_gradient_TD, grad_loss, x_gradient_TD.dtype)
        weight_gradient = _scaled(weight_gradient_VD, grad_loss, ctx.weight_dtype)
        bias_gradient = (
            None
            if bias_gradient_V is None
            else _scaled(bias_gradient_V, grad_loss, ctx.weight_dtype)
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
        self.chunk_losses: ChunkLosses = chunk_losses
        self._tensor: TensorParallel | None = None

    @property
    def is_shared(self) -> bool:
        """Whether this rank has a part of the vocabulary, so that its loss needs the others."""
        return self._tensor is not None

    def share(self, tensor: TensorParallel, tied: nn.Parameter | None) -> None:
        """Keep this rank's rows.

        Args:
            tied: the embedding's, if the weight is the same one.
        """
        self._tensor = tensor
        if tied is None:
            cut(self, "weight", 0, tensor)
        else:
            self.weight = tied
        if self.bias is not None:
            cut(self, "bias", 0, tensor)
        first = tensor.part * len(self.weight)
        self.vocab_size = min(self.vocab_size - first, len(self.weight))
        self.chunk_losses = partial(sharded_chunk_losses, tensor=tensor, first=first)

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
        if self._tensor is not None:
            x_BSE, labels_BS = (self._tensor.gather(each, dim=1) for each in (x_BSE, labels_BS))
        x_TE = x_BSE.reshape(-1, x_BSE.shape[-1])
        # Inside an autograd function the gradient mode is always off, so it is asked for here.
        needs_gradient = torch.is_grad_enabled()
        # The tokens of all sequences are one batch of T = B * S from here on.
        labels_T = labels_BS.reshape(-1)
        sizes = self.vocab_size, self.chunk_tokens, self.z_loss_weight
        return _ChunkedCrossEntropy.apply(
            x_TE, self.weight, self.bias, labels_T, *sizes, self.chunk_losses, needs_gradient
        )
