"""Experts by the package grouped_gemm (Gale et al. 2022, MegaBlocks), in bf16 on a GPU.

Imported only if a recipe chooses it. It takes the row counts on the host, so that each layer waits
for the device once more than with torch's product.
"""

from __future__ import annotations

import torch
from grouped_gemm.ops import gmm

from pretrain.model.moe.experts import ExpertBiases, ExpertForm, experts_by_product


def experts_grouped_gemm(
    x_RD: torch.Tensor,
    counts_e: torch.Tensor,
    *,
    w1_eXD: torch.Tensor,
    w2_eDF: torch.Tensor,
    w3_eXD: torch.Tensor,
    form: ExpertForm,
    biases: ExpertBiases | None = None,
) -> torch.Tensor:
    """An ``ExpertFunction``: all experts at once by ``gmm``, whose gradients are its own too."""
    sizes_e = counts_e.cpu()
    return experts_by_product(
        lambda x_RI, weight_eOI: gmm(x_RI, weight_eOI, sizes_e, trans_b=True),
        x_RD,
        counts_e,
        matrices=(w1_eXD, w2_eDF, w3_eXD),
        form=form,
        biases=biases,
    )
