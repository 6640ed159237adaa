"""A declarative map between this project's parameter names and another one's, for both directions.

"Ours" is a tensor of this project, "theirs" is one of the other. A target lists templates such as
``"layers.{layer}.attention_norm.weight" -> "model.layers.{layer}.input_layernorm.weight"``. If only
the other name has ``{expert}``, ours stacks all experts along its first dimension. Expanded over
layers and experts, templates become links. Tensors are made one by one in either direction, so that
neither model is ever in memory as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from pretrain.checkpoint.tensor_headers import TensorForm
from pretrain.core.errors import CheckpointError


class Tensors(Protocol):
    """Named tensors that are read one by one, such as those of a TensorReader."""

    @property
    def names(self) -> list[str]: ...

    def form(self, name: str) -> TensorForm: ...

    def read(self, name: str, index: int | None = None) -> Tensor: ...


@dataclass(frozen=True)
class RotaryRows:
    """The order of the rows of rotary queries or keys.

    The last ``rotated`` of each head's ``plain + rotated`` rows are rotated in pairs: rows
    (i, i + rotated / 2) in ours, (2 i, 2 i + 1) in theirs. The scores are the same in both orders,
    as long as queries and keys have the same one.
    """

    heads: int
    plain: int
    rotated: int

    def to_theirs(self, tensor: Tensor) -> Tensor:
        """The rows of a weight or bias in their order."""
        return self._ordered(tensor, (2, self.rotated // 2))

    def to_ours(self, tensor: Tensor) -> Tensor:
        """The rows of a weight or bias in our order."""
        return self._ordered(tensor, (self.rotated // 2, 2))

    def _ordered(self, tensor: Tensor, pairs: tuple[int, int]) -> Tensor:
        plain, rotated = tensor.unflatten(0, (self.heads, self.plain + self.rotated)).split(
            (self.plain, self.rotated), dim=1
        )
        return torch.cat(
            (plain, rotated.unflatten(1, pairs).transpose(1, 2).flatten(1, 2)), dim=1
        ).flatten(0, 1)


@dataclass(frozen=True)
class Link:
    """A tensor of ours, or a part of it, and its place in a tensor of theirs.

    ``theirs[their_expert][..., column::2] = scale * ours[expert][:rows]``; what is None is left
    out.

    Attributes:
        rows: cuts off the padding of the vocabulary.
        column: 0 or 1, if theirs interleaves two tensors of ours along its last dimension.
        transposed: whether theirs is multiplied from the other side.
        scale: a power of two, so that nothing is rounded.
        heads: the order of rotary rows, if theirs has another one.
        part: (index, count), if theirs has ``count`` tensors of ours in a row along its second
            dimension.
        exact: whether theirs is fp32 whatever dtype is written.
    """

    ours: str
    theirs: str
    expert: int | None = None
    rows: int | None = None
    their_expert: int | None = None
    column: int | None = None
    transposed: bool = False
    scale: float = 1.0
    heads: RotaryRows | None = None
    part: tuple[int, int] | None = None
    exact: bool = False

    def of_ours(self, ours: Tensors) -> Tensor:
        """Our part in the layout of theirs, in our dtype; a view of what was read if possible."""
        tensor = ours.read(self.ours, self.expert)[: self.rows]
        tensor = tensor if self.heads is None else self.heads.to_theirs(tensor)
        tensor = tensor if self.scale == 1.0 else tensor * self.scale
        return tensor.transpose(0, 1) if self.transposed else tensor

    def of_theirs(self, theirs: Tensors) -> Tensor:
        """Their part in their dtype; equal to :meth:`of_ours` if both models are."""
        return self.place(theirs.read(self.theirs, self.their_expert))

    def place(self, tensor: Tensor) -> Tensor:
        """The part of their tensor, or of one expert of it, that is ours; a view."""
        tensor = tensor if self.part is None else tensor.chunk(self.part[1], dim=1)[self.part[0]]
        return tensor if self.column is None else tensor[..., self.column :: 2]

    def back(self, theirs: Tensors) -> Tensor:
        """Their part in the layout of ours."""
        tensor = self.of_theirs(theirs)
        tensor = tensor.transpose(0, 1) if self.transposed else tensor
        tensor = tensor if self.scale == 1.0 else tensor / self.scale
        return tensor if self.heads is None else self.heads.to_ours(tensor)

    def form(self, ours: Tensors, dtype: torch.dtype) -> TensorForm:
        """Dtype and shape of :meth:`of_ours` in a file of ``dtype``."""
        shape = ours.form(self.ours).shape[0 if self.expert is None else 1 :]
        shape = shape if self.rows is None else (self.rows, *shape[1:])
        return TensorForm(
            torch.float32 if self.exact else dtype, shape[::-1] if self.transposed else shape
        )


@dataclass(frozen=True)
class Zeros:
    """A tensor of theirs without a counterpart in ours, which has no effect if it is zero."""

    theirs: str
    shape: tuple[int, ...]
    exact: bool = False


Links = list[Link | Zeros]


def expand(
    templates: Mapping[str, str],
    layers: Iterable[int] = (0,),
    num_experts: int = 1,
    rows: int | None = None,
    **options: Any,
) -> list[Link]:
    """The links of templates (ours to theirs) for the given layers, one for each stacked expert."""
    links = []
    for ours, theirs in templates.items():
        for layer in layers:
            for expert in range(num_experts if "{expert}" in theirs else 1):
                # Ours has one tensor for all experts: each link reads one slice of it.
                stacked = "{expert}" in theirs and "{expert}" not in ours
                link = Link(
                    ours.format(layer=layer, expert=expert),
                    theirs.format(layer=layer, expert=expert),
                    expert if stacked else None,
                    rows,
                )
                links.append(replace(link, **options))
    return links


def stacked(
    templates: Mapping[str, str], layers: Iterable[int], num_experts: int, **options: Any
) -> list[Link]:
    """As :func:`expand`, for tensors of theirs that stack all experts; ours may or may not."""
    return [
        Link(
            ours.format(layer=layer, expert=expert),
            theirs.format(layer=layer),
            None if "{expert}" in ours else expert,
            their_expert=expert,
            **options,
        )
        for ours, theirs in templates.items()
        for layer in layers
        for expert in range(num_experts)
    ]


def check_names(links: Iterable[Link | Zeros], ours: Tensors, left_out: Iterable[str] = ()) -> None:
    """Checks that every tensor of ours has a link, unless it is left out, and every link a tensor.

    Raises:
        CheckpointError: for the first that has not.
    """
    linked = {link.ours for link in links if isinstance(link, Link)}
    names = set(ours.names)
    if missing := sorted(linked - names):
        raise CheckpointError(
            f"the checkpoint has no tensor '{missing[0]}' ({len(missing)} missing): it does not"
            " belong to its recipe"
        )
    if unknown := sorted(names - linked - set(left_out)):
        raise CheckpointError(
            f"the export has no name for the tensor '{unknown[0]}' ({len(unknown)} unknown): the"
            " checkpoint does not belong to its recipe"
        )


def is_left_out(name: str) -> bool:
    """Whether only training reads a tensor of ours: multi-token prediction and router noise."""
    return name.startswith("multi_token.") or name.endswith(".router.noise.weight")


def their_forms(
    links: Iterable[Link | Zeros], ours: Tensors, dtype: torch.dtype
) -> dict[str, TensorForm]:
    """Names, dtypes and shapes of all tensors of theirs, in order."""
    forms: dict[str, TensorForm] = {}
    experts: dict[str, int] = {}
    for link in links:
        if isinstance(link, Zeros):
            forms[link.theirs] = TensorForm(torch.float32 if link.exact else dtype, link.shape)
            continue
        dtype_of_it, shape = link.form(ours, dtype)
        shape = shape if link.column is None else (*shape[:-1], 2 * shape[-1])
        shape = shape if link.part is None else (shape[0], link.part[1] * shape[1], *shape[2:])
        if link.their_expert is not None:
            experts[link.theirs] = max(experts.get(link.theirs, 0), link.their_expert + 1)
            shape = (experts[link.theirs], *shape)
        forms[link.theirs] = TensorForm(dtype_of_it, shape)
    return forms


def to_theirs(
    links: Iterable[Link | Zeros], ours: Tensors, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """All tensors of theirs, one by one, in the order of :func:`their_forms`."""
    groups: dict[str, list[Link | Zeros]] = {}
    for link in links:
        groups.setdefault(link.theirs, []).append(link)
    for theirs, form in their_forms(links, ours, dtype).items():
        first = groups[theirs][0]
        if isinstance(first, Link) and len(groups[theirs]) == 1 and first.their_expert is None:
            yield theirs, first.of_ours(ours).to(form.dtype)
            continue
        # Several tensors of ours become one of theirs: each is copied into its place.
        tensor = torch.zeros(form.shape, dtype=form.dtype)
        for link in groups[theirs]:
            if isinstance(link, Link):
                link.place(
                    tensor if link.their_expert is None else tensor[link.their_expert]
                ).copy_(link.of_ours(ours))
        yield theirs, tensor


def to_ours(
    links: Iterable[Link | Zeros], theirs: Tensors, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, Tensor]]:
    """All tensors of ours in fp32, one by one, in the order of ``shapes``.

    Padding of the vocabulary is zero.

    Raises:
        CheckpointError: if a tensor that a link names is missing, or does not fit.
    """
    groups: dict[str, list[Link]] = {}
    for link in links:
        if isinstance(link, Link):
            groups.setdefault(link.ours, []).append(link)
    names = set(theirs.names)
    for ours, shape in shapes.items():
        tensor = torch.zeros(shape)
        for link in groups[ours]:
            if link.theirs not in names:
                raise CheckpointError(
                    f"there is no tensor '{link.theirs}': the files are incomplete"
                )
            place = (tensor if link.expert is None else tensor[link.expert])[: link.rows]
            share = link.back(theirs)
            if place.shape != share.shape:
                raise CheckpointError(
                    f"the tensor '{link.theirs}' has the shape {list(share.shape)} instead of"
                    f" {list(place.shape)}: it is damaged"
                )
            place.copy_(share)
        yield ours, tensor
