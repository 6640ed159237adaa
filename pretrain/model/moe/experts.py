"""Many experts over rows grouped by expert: a plain loop, and grouped matrix products."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from pretrain.model.config import FeedForwardConfig
from pretrain.model.feed_forward import FeedForward


class ExpertBiases(NamedTuple):
    """Biases of this rank's experts: first products [e, X] each, output [e, D]."""

    b1_eX: torch.Tensor
    b3_eX: torch.Tensor
    b2_eD: torch.Tensor


class ExpertForm(NamedTuple):
    """What an expert computes between its products.

    Attributes:
        kind: the feed-forward whose activation it has.
        config: the section of that kind.
        dropout: of its hidden units; 0 outside training.
        compiled: ``kind.activate`` by ``torch.compile``, for any number of rows; None if it is not
            compiled.
    """

    kind: type[FeedForward]
    config: FeedForwardConfig
    dropout: float = 0.0
    compiled: Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor] | None = None

    def hidden(self, first: torch.Tensor, third: torch.Tensor) -> torch.Tensor:
        """The hidden units [..., F] from the two first products [..., X] each."""
        activate: Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor] = self.kind.activate
        # 0 and 1 rows would be graphs of their own: compiled shapes are general from 2 on.
        if self.compiled is not None and len(first) > 1:
            activate = self.compiled
        return functional.dropout(activate(self.config, first, third), self.dropout)


def experts_loop(
    x_RD: torch.Tensor,
    counts_e: torch.Tensor,
    *,
    w1_eXD: torch.Tensor,
    w2_eDF: torch.Tensor,
    w3_eXD: torch.Tensor,
    form: ExpertForm,
    biases: ExpertBiases | None = None,
) -> torch.Tensor:
    """One expert after the other: the reference, and the fastest form for few rows on CPUs.

    Reads the counts on the host, which synchronises with a GPU.
    """
    outputs: list[torch.Tensor] = []
    rows = x_RD.split(counts_e.tolist())
    b1, b3, b2 = (
        ([None] * len(rows),) * 3 if biases is None else (bias.unbind(0) for bias in biases)
    )
    # Unbound, not indexed: the backward pass of an index would build a full-size gradient per
    # expert.
    for expert, (w1_XD, w2_DF, w3_XD) in enumerate(
        zip(w1_eXD.unbind(0), w2_eDF.unbind(0), w3_eXD.unbind(0), strict=True)
    ):
        x_rD = rows[expert]
        # In training an expert without rows runs all the same, to get a gradient of zeros.
        if not torch.is_grad_enabled() and not len(x_rD):
            continue
        hidden_rF = form.hidden(
            functional.linear(x_rD, w1_XD, b1[expert]), functional.linear(x_rD, w3_XD, b3[expert])
        )
        outputs.append(functional.linear(hidden_rF, w2_DF, b2[expert]))
    # There is no output at all if no token of any rank chose one of these experts.
    return torch.cat(outputs) if outputs else x_RD


def experts_of_few_tokens(
    x_TD: torch.Tensor,
    chosen: list[int],
    *,
    w1_eXD: torch.Tensor,
    w2_eDF: torch.Tensor,
    w3_eXD: torch.Tensor,
    form: ExpertForm,
    biases: ExpertBiases | None = None,
) -> torch.Tensor:
    """The outputs of each token's K chosen experts, [T * K, D], in the order of the choices.

    Rows are grouped on the host, and experts without rows cost nothing.
    """
    # The choices of each expert, in their order.
    places: dict[int, list[int]] = {}
    for place, expert in enumerate(chosen):
        places.setdefault(expert, []).append(place)
    order = [place for choices in places.values() for place in choices]
    # A single token is every expert's only row, and its experts are in the order of the choices.
    is_single = len(x_TD) == 1
    rows: Iterable[torch.Tensor] = itertools.repeat(x_TD)
    if not is_single:
        token_R = torch.tensor(order, device=x_TD.device) // (len(chosen) // len(x_TD))
        rows = x_TD.index_select(0, token_R).split([len(choices) for choices in places.values()])
    outputs = []
    for expert, x_rD in zip(places, rows, strict=False):
        b1, b3, b2 = (None, None, None) if biases is None else (bias[expert] for bias in biases)
        hidden_rF = form.hidden(
            functional.linear(x_rD, w1_eXD[expert], b1), functional.linear(x_rD, w3_eXD[expert], b3)
        )
        outputs.append(functional.linear(hidden_rF, w2_eDF[expert], b2))
    rows_RD = torch.cat(outputs)
    if is_single:
        return rows_RD
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return rows_RD.index_select(0, torch.tensor(inverse, device=x_TD.device))


class _GroupedLinear(torch.autograd.Function):
    """x [R, in] times the transposed matrix [out, in] of each row's expert.

    The backward pass of torch's own product returns the gradient of a transposed weight, which
    autograd then copies into the weight's layout; here it has that layout from the start. And the
    weight itself is saved, no view of it, which would keep the memory that ZeRO-3 means to free.

    Groups are of any size, none is padded. torch's kernel for bf16 on CUDA wants the start of each
    group on 16 bytes: here that is the start of a row, in all three products. Only its fp8 forms
    need groups of multiples of 16 (MXFP8: 32) rows.
    """

    @staticmethod
    def forward(ctx, x_RI, weight_eOI, offsets_e):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x_RI, weight_eOI, offsets_e)
        # A rank may receive no row at all; kernels for CUDA are not built for that.
        if len(x_RI) == 0:
            return x_RI.new_empty(0, weight_eOI.shape[1])
        return functional.grouped_mm(x_RI, weight_eOI.transpose(-2, -1), offs=offsets_e)

    @staticmethod
    def backward(ctx, grad_RO):  # type: ignore[no-untyped-def]
        x_RI, weight_eOI, offsets_e = ctx.saved_tensors
        if len(x_RI) == 0:
            return torch.zeros_like(x_RI), torch.zeros_like(weight_eOI), None
        x_gradient = weight_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = functional.grouped_mm(grad_RO, weight_eOI, offs=offsets_e)
        if ctx.needs_input_grad[1]:
            weight_gradient = functional.grouped_mm(grad_RO.T, x_RI, offs=offsets_e)
            if grad_RO.is_cuda and torch.cuda.get_device_capability(grad_RO.device)[0] >= 10:
                weight_gradient = zero_where_no_rows(weight_gradient, offsets_e)
        return x_gradient, weight_gradient, None


def zero_where_no_rows(gradient_eOI: torch.Tensor, offsets_e: torch.Tensor) -> torch.Tensor:
    """A gradient of experts, 0 for those without rows.

    On GPUs of compute capability 10 torch's grouped product returns something else for them
    (https://github.com/pytorch/pytorch/issues/172439).
    """
    is_empty_e = offsets_e.diff(prepend=offsets_e.new_zeros(1)) == 0
    return gradient_eOI.masked_fill(is_empty_e[:, None, None], 0.0)


def _grouped_linear(
    x_RI: torch.Tensor, weight_eOI: torch.Tensor, offsets_e: torch.Tensor
) -> torch.Tensor:
    return _GroupedLinear.apply(x_RI, weight_eOI, offsets_e)


def experts_grouped_mm(
    x_RD: torch.Tensor,
    counts_e: torch.Tensor,
    *,
    w1_eXD: torch.Tensor,
    w2_eDF: torch.Tensor,
    w3_eXD: torch.Tensor,
    form: ExpertForm,
    biases: ExpertBiases | None = None,
) -> torch.Tensor:
    """All experts at once by ``torch.nn.functional.grouped_mm``; the counts stay on the device."""
    # grouped_mm takes the end of each group, int32.
    offsets_e = counts_e.cumsum(0, dtype=torch.int32)
    return experts_by_product(
        lambda x_RI, weight_eOI: _grouped_linear(x_RI, weight_eOI, offsets_e),
        x_RD,
        counts_e,
        matrices=(w1_eXD, w2_eDF, w3_eXD),
        form=form,
        biases=biases,
    )


def experts_by_product(
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    x_RD: torch.Tensor,
    counts_e: torch.Tensor,
    *,
    matrices: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    form: ExpertForm,
    biases: ExpertBiases | None,
) -> torch.Tensor:
    """All experts at once by a product of rows grouped by expert with [e, out, in] matrices.

    Args:
        product: rows [R, in] times the transposed matrix [out, in] of each row's expert, [R, out].
        matrices: w1, w2 and w3.
    """
    w1_eXD, w2_eDF, w3_eXD = matrices
    # Two products read x twice and their gradients by x are added: 12 R D bytes in bf16 that one
    # product by both matrices would spare. To join them it has to copy both in either pass: 16 e X
    # D bytes a micro batch, more than it spares up to 4/3 X rows per expert, and a second copy of
    # the matrices to hold.
    first_RX, third_RX = product(x_RD, w1_eXD), product(x_RD, w3_eXD)
    if biases is None:
        return product(form.hidden(first_RX, third_RX), w2_eDF)
    # Grouped products take no bias: each row's own is looked up.
    expert_R = torch.repeat_interleave(counts_e, output_size=x_RD.shape[0])
    hidden_RF = form.hidden(first_RX + biases.b1_eX[expert_R], third_RX + biases.b3_eX[expert_R])
    return product(hidden_RF, w2_eDF) + biases.b2_eD[expert_R]


def prefers_grouped_mm(x: torch.Tensor, w1_eXD: torch.Tensor, w2_eDF: torch.Tensor) -> bool:
    """Whether the kernel ``auto`` is the grouped product for rows like these.

    On CUDA it computes in bf16 only, fewer than 1024 matrices whose rows are whole 16 bytes. On
    CPUs it saves the stacking of the experts' gradients in training, with the same bits; else the
    loop is faster, which passes over experts without rows.
    """
    if x.is_cuda:
        fits = len(w1_eXD) < 1024 and w1_eXD.shape[-1] % 8 == 0 and w2_eDF.shape[-1] % 8 == 0
        return fits and x.dtype == torch.bfloat16
    return torch.is_grad_enabled() and x.dtype in (torch.bfloat16, torch.float32)


def experts_auto(x_RD: torch.Tensor, counts_e: torch.Tensor, **terms: Any) -> torch.Tensor:
    """The loop or torch's grouped product, see :func:`prefers_grouped_mm`."""
    grouped = prefers_grouped_mm(x_RD, terms["w1_eXD"], terms["w2_eDF"])
    return (experts_grouped_mm if grouped else experts_loop)(x_RD, counts_e, **terms)


# Rows grouped by local expert [R, D] and the row count of each [e] -> [R, D]; by keyword the
# matrices w1_eXD, w2_eDF and w3_eXD, the form and the biases.
ExpertFunction = Callable[..., torch.Tensor]


class Experts(nn.Module):
    """This rank's experts: ``w1`` and ``w3`` [e, X, D], the activation, then ``w2`` [e, D, F].

    In gated kinds w1 is the gate's matrix and w3 the other one; in the others they are the upper
    and the lower half of the single matrix.

    The module adopts the parameters that DeepSpeed's layer created and tagged. It must compute with
    them itself, because ZeRO-3 gathers a parameter when the module that holds it is called.
    """

    def __init__(
        self,
        w1: nn.Parameter,
        w2: nn.Parameter,
        w3: nn.Parameter,
        form: ExpertForm,
        kernel: ExpertFunction,
        first: int,
    ) -> None:
        super().__init__()
        self.w1 = w1
        self.w2 = w2
        self.w3 = w3
        self.form = form
        self.kernel = kernel
        self.first = first

    def is_grouped(self, x: torch.Tensor) -> bool:
        """Whether rows like these are multiplied by a grouped product, not one by one."""
        if self.kernel is experts_auto:
            return prefers_grouped_mm(x, self.w1, self.w2)
        return self.kernel is not experts_loop

    def forward(
        self,
        x_RD: torch.Tensor,
        counts_e: torch.Tensor | None,
        biases: ExpertBiases | None,
        chosen: list[int] | None = None,
    ) -> torch.Tensor:
        """Rows grouped by local expert [R, D] and the row count of each [e] -> [R, D].

        Args:
            chosen: instead of the counts, the K experts of each of few tokens [T, D], whose outputs
                [T * K, D] are returned.
        """
        form = self.form if self.training else self.form._replace(dropout=0.0)
        matrices = {"w1_eXD": self.w1, "w2_eDF": self.w2, "w3_eXD": self.w3}
        if chosen is not None:
            return experts_of_few_tokens(x_RD, chosen, **matrices, form=form, biases=biases)
        assert counts_e is not None
        return self.kernel(x_RD, counts_e, **matrices, form=form, biases=biases)
