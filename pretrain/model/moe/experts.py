"""Many SwiGLU experts over rows grouped by expert: a plain loop, and torch's grouped matrix product."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


def experts_loop(x_RD: torch.Tensor, counts_e: torch.Tensor, w1_eFD: torch.Tensor, w2_eDF: torch.Tensor, w3_eFD: torch.Tensor) -> torch.Tensor:
    """One expert after the other. The reference, and the fastest form on CPUs; reads the counts on the host.

    The weights are unbound, not indexed: indexing would build a full-size gradient for each expert.
    """
    outputs = []
    for x_rD, w1_FD, w2_DF, w3_FD in zip(x_RD.split(counts_e.tolist()), w1_eFD.unbind(0), w2_eDF.unbind(0), w3_eFD.unbind(0), strict=True):
        hidden_rF = functional.silu(functional.linear(x_rD, w1_FD)) * functional.linear(x_rD, w3_FD)
        outputs.append(functional.linear(hidden_rF, w2_DF))
    return torch.cat(outputs)


def experts_grouped_mm(x_RD: torch.Tensor, counts_e: torch.Tensor, w1_eFD: torch.Tensor, w2_eDF: torch.Tensor, w3_eFD: torch.Tensor) -> torch.Tensor:
    """All experts at once by ``torch.nn.functional.grouped_mm``; the counts stay on the device."""
    offsets_e = counts_e.cumsum(0, dtype=torch.int32)
    gate_RF = functional.grouped_mm(x_RD, w1_eFD.transpose(-2, -1), offs=offsets_e)
    up_RF = functional.grouped_mm(x_RD, w3_eFD.transpose(-2, -1), offs=offsets_e)
    return functional.grouped_mm(functional.silu(gate_RF) * up_RF, w2_eDF.transpose(-2, -1), offs=offsets_e)


class Experts(nn.Module):
    """This rank's experts: ``w1`` (gate) and ``w3`` (up) [e, F, D], ``w2`` (down) [e, D, F].

    Takes over the parameters that DeepSpeed's layer created and tagged; the module itself must own the computation, because ZeRO-3
    gathers a parameter when the module that holds it is called.
    """

    def __init__(self, w1: nn.Parameter, w2: nn.Parameter, w3: nn.Parameter, kernel: str) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = w1, w2, w3
        self.kernel = kernel

    def forward(self, x_RD: torch.Tensor, counts_e: torch.Tensor) -> torch.Tensor:
        """Rows grouped by local expert [R, D] and the number of rows of each [e] -> [R, D]."""
        # CUDA's grouped product takes bf16 only.
        use_grouped = self.kernel == "grouped_mm" or (self.kernel == "auto" and x_RD.is_cuda and x_RD.dtype == torch.bfloat16)
        compute = experts_grouped_mm if use_grouped else experts_loop
        return compute(x_RD, counts_e, self.w1, self.w2, self.w3)
