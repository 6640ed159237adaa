"""A declarative map between our parameter names and another project's, used in both directions.

A target lists templates such as ``"layers.{layer}.attention_norm.weight" -> "model.layers.{layer}.input_layernorm.weight"``. Where only the other
name has ``{expert}``, ours stacks all experts along its first dimension. Expanded over layers and experts, templates become links, one
for each tensor of the other project.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.config.errors import CheckpointError


@dataclass(frozen=True)
class Link:
    """theirs = ours[expert][:rows], each part only where it is given.

    ``rows`` cuts the padding of the vocabulary.
    """

    ours: str
    theirs: str
    expert: int | None = None
    rows: int | None = None


def expand(templates: Mapping[str, str], layers: Iterable[int] = (0,), num_experts: int = 1, rows: int | None = None) -> list[Link]:
    """The links of ``templates`` (ours to theirs) for the given layers; the experts of stacked tensors are taken apart."""
    links = []
    for ours, theirs in templates.items():
        for layer in layers:
            for expert in range(num_experts if "{expert}" in theirs else 1):
                stacked = "{expert}" in theirs and "{expert}" not in ours
                links.append(
                    Link(ours.format(layer=layer, expert=expert), theirs.format(layer=layer, expert=expert), expert if stacked else None, rows)
                )
    return links


def to_theirs(links: Iterable[Link], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames, unstacks and cuts; the results are copies, so that no two share memory.

    Raises:
        CheckpointError: when a tensor that a link names is missing, or one that no link names is left over.
    """
    links = list(links)
    names = {link.ours for link in links}
    if missing := sorted(names - ours.keys()):
        raise CheckpointError(f"the checkpoint has no tensor '{missing[0]}' ({len(missing)} missing): it does not belong to its recipe")
    if unknown := sorted(ours.keys() - names):
        raise CheckpointError(
            f"the export has no name for the tensor '{unknown[0]}' ({len(unknown)} unknown): the checkpoint does not belong to its recipe"
        )
    theirs = {}
    for link in links:
        tensor = ours[link.ours] if link.expert is None else ours[link.ours][link.expert]
        theirs[link.theirs] = tensor[: link.rows].clone(memory_format=torch.contiguous_format)
    return theirs


def to_ours(links: Iterable[Link], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The way back: renames and stacks. A vocabulary comes without padding.

    Raises:
        CheckpointError: when a tensor that a link names is missing.
    """
    parts: dict[str, list[Tensor]] = {}
    stacked = set()
    for link in links:
        if link.theirs not in theirs:
            raise CheckpointError(f"there is no tensor '{link.theirs}': the files are incomplete, export again")
        parts.setdefault(link.ours, []).append(theirs[link.theirs])
        if link.expert is not None:
            stacked.add(link.ours)
    return {name: torch.stack(tensors) if name in stacked else tensors[0] for name, tensors in parts.items()}


def without_padding(links: Iterable[Link], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors as far as the links reach: views of them without the vocabulary's padding."""
    rows = {link.ours: link.rows for link in links}
    return {name: ours[name][:count] for name, count in rows.items()}
