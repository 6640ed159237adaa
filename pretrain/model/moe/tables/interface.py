"""The interface of a kernel for products with a table: which rows each token chose."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch


class Bags(NamedTuple):
    """The rows that each token chose, as in a CSR matrix.

    Those of token t are ``row_P[offsets_T1[t] : offsets_T1[t + 1]]``; int64, [P] and [T + 1] for P
    pairs of a token and a row.
    """

    row_P: torch.Tensor
    offsets_T1: torch.Tensor

    def owners(self) -> torch.Tensor:
        """The token of each pair, [P] int64."""
        tokens = torch.arange(self.offsets_T1.numel() - 1, device=self.row_P.device)
        # output_size spares a synchronisation with the device.
        return tokens.repeat_interleave(self.offsets_T1.diff(), output_size=self.row_P.numel())

    def widened(self, width: int) -> Bags:
        """The same choice in a table that has ``width`` neighbouring rows for each of these."""
        if width == 1:
            return self
        # Expert n of a table with width X has the rows n * X to n * X + X - 1.
        row_PX = self.row_P[:, None] * width + torch.arange(width, device=self.row_P.device)
        return Bags(row_PX.reshape(-1), self.offsets_T1 * width)


class TableKernel(NamedTuple):
    """One way to compute both products.

    ``row_dots(x_TD, table_ND, bags) -> [P]`` and ``weighted_rows(c_P, table_ND, bags) -> [T, D]``.
    """

    row_dots: Callable[[torch.Tensor, torch.Tensor, Bags], torch.Tensor]
    weighted_rows: Callable[[torch.Tensor, torch.Tensor, Bags], torch.Tensor]
