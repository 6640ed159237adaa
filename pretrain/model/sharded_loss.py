"""Cross-entropy of logits whose vocabulary is cut into parts over ranks (Shoeybi et al. 2019).

Arithmetic is that of Megatron-LM's vocabulary-parallel cross-entropy, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor, distributed

from pretrain.model.token_parallel import TensorParallel, process_group

# The value that torch's cross-entropy ignores by default.
IGNORED_LABEL = -100


def sharded_chunk_losses(
    logits_Cv: Tensor, labels_C: Tensor, z_loss_weight: float, tensor: TensorParallel, first: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Nll and loss of C tokens, divided by the ranks, and d loss / d logits [C, v]; all fp32.

    Every rank has the same tokens, so each counts the ranks' part of their sum.

    Args:
        logits_Cv: of this rank's part of the vocabulary, which begins with id ``first``.
        labels_C: ids of the whole vocabulary; -100 for no loss.
    """
    group = process_group(tensor.group_name)
    logits_Cv = logits_Cv.float()
    largest_C1 = logits_Cv.amax(dim=-1, keepdim=True)
    distributed.all_reduce(largest_C1, distributed.ReduceOp.MAX, group=group)
    shifted_Cv = logits_Cv - largest_C1
    local_C1 = labels_C[:, None] - first
    is_here_C1 = (local_C1 >= 0) & (local_C1 < logits_Cv.shape[1])
    local_C1 = local_C1.where(is_here_C1, torch.zeros_like(local_C1))
    target_C1 = shifted_Cv.gather(1, local_C1) * is_here_C1
    gradient_Cv = shifted_Cv.exp_()
    sums_2C1 = torch.stack((gradient_Cv.sum(dim=-1, keepdim=True), target_C1))
    distributed.all_reduce(sums_2C1, group=group)
    sum_C1, target_C1 = sums_2C1
    counted_C1 = (labels_C != IGNORED_LABEL)[:, None]
    log_sum_C1 = sum_C1.log()
    nll = loss = (log_sum_C1 - target_C1).masked_fill(~counted_C1, 0.0).sum()
    weight_C1 = counted_C1.float()
    scale_C1 = weight_C1
    if z_loss_weight:
        logsumexp_C1 = (largest_C1 + log_sum_C1).masked_fill(~counted_C1, 0.0)
        loss = nll + z_loss_weight * logsumexp_C1.square().sum()
        scale_C1 = weight_C1 * (1.0 + 2.0 * z_loss_weight * logsumexp_C1)
    gradient_Cv.mul_(scale_C1 / sum_C1)
    gradient_Cv.scatter_add_(1, local_C1, -weight_C1 * is_here_C1)
    return nll / tensor.parts, loss / tensor.parts, gradient_Cv
