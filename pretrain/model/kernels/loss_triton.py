"""Cross-entropy of a chunk of logits and its gradient, in place: two reads and one write each.

Liger Kernel's linear cross-entropy counts the labels on the host, which waits for the device at
every step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import custom_op

# Logits of a row that a program reads at once.
MOST_COLUMNS = 8192


@triton.jit
def _chunk_loss_kernel(
    logits_CV: tl.tensor,
    labels_C: tl.tensor,
    nll_C: tl.tensor,
    loss_C: tl.tensor,
    z_loss_weight: tl.tensor,
    row_stride: tl.tensor,
    V: tl.constexpr,
    COLUMNS: tl.constexpr,
    IGNORED: tl.constexpr,
) -> None:
    """One program computes a token's losses, and writes its gradient over its logits."""
    # 64 bits: a chunk may have more than 2^31 logits.
    row = tl.program_id(0).to(tl.int64)
    logits_V = logits_CV + row * row_stride
    label = tl.load(labels_C + row)
    counted = label != IGNORED
    largest = float("-inf")
    total = 0.0
    # The sum is rescaled whenever a larger logit comes (Milakov & Gimelshein 2018).
    for start in range(0, V, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        logit = tl.load(logits_V + column, mask=column < V, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(logit, axis=0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(logit - larger), axis=0)
        largest = larger
    label_logit = tl.load(logits_V + tl.where(counted, label, 0)).to(tl.float32)
    # All threads have read the label's logit before any overwrites it.
    tl.debug_barrier()
    # Not as logsumexp - logit: both may be large, and their difference would lose digits.
    nll = tl.log(total) - (label_logit - largest)
    logsumexp = largest + tl.log(total)
    tl.store(nll_C + row, tl.where(counted, nll, 0.0))
    loss = nll + z_loss_weight * logsumexp * logsumexp
    tl.store(loss_C + row, tl.where(counted, loss, 0.0))
    scale = (1.0 + 2.0 * z_loss_weight * logsumexp) / total
    for start in range(0, V, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        logit = tl.load(logits_V + column, mask=column < V, other=float("-inf")).to(tl.float32)
        gradient = tl.exp(logit - largest) * scale - tl.where(column == label, 1.0, 0.0)
        tl.store(logits_V + column, tl.where(counted, gradient, 0.0), mask=column < V)


@custom_op("pretrain::chunk_losses_", mutates_args={"logits_CV"})
def chunk_losses_(
    logits_CV: torch.Tensor, labels_C: torch.Tensor, z_loss_weight: float, ignored_label: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's nll and loss, fp32 [C]; ``logits_CV`` becomes the gradient of the loss.

    The plain reference is ``plain_chunk_losses``. Computed in fp32, whatever the logits' dtype.
    """
    C, V = logits_CV.shape
    nll_C = torch.empty(C, dtype=torch.float32, device=logits_CV.device)
    loss_C = torch.empty_like(nll_C)
    assert logits_CV.stride(1) == 1
    if C:
        columns = min(triton.next_power_of_2(V), MOST_COLUMNS)
        # Triton launches on the current device, which need not be the tensors'.
        with torch.cuda.device_of(logits_CV):
            _chunk_loss_kernel[(C,)](
                logits_CV,
                labels_C.contiguous(),
                nll_C,
                loss_C,
                z_loss_weight,
                logits_CV.stride(0),
                V,
                columns,
                ignored_label,
                num_warps=max(columns // 512, 1),
            )
    return nll_C, loss_C


@chunk_losses_.register_fake
def _(
    logits_CV: torch.Tensor, labels_C: torch.Tensor, z_loss_weight: float, ignored_label: int
) -> tuple[torch.Tensor, torch.Tensor]:
    nll_C = torch.empty(logits_CV.shape[0], dtype=torch.float32, device=logits_CV.device)
    return nll_C, torch.empty_like(nll_C)
