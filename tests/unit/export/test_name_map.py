from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pretrain.checkpoint.tensor_headers import TensorForm
from pretrain.core.errors import CheckpointError
from pretrain.export.name_map import (
    Link,
    Links,
    RotaryRows,
    Zeros,
    check_names,
    expand,
    stacked,
    their_forms,
    to_ours,
    to_theirs,
)
from tests.support.in_memory_tensors import InMemoryTensors

LINKS: Links = [
    *expand({"embedding.weight": "embed.weight"}, rows=5),
    *expand({"layers.{layer}.w": "blocks.{layer}.e.{expert}.w"}, layers=[0, 2], num_experts=3),
    *expand({"layers.{layer}.x.{expert}": "blocks.{layer}.x.{expert}"}, layers=[2], num_experts=2),
    *stacked({"layers.{layer}.gate": "blocks.{layer}.gate_up"}, [0], 3, column=0, transposed=True),
    *stacked({"layers.{layer}.up": "blocks.{layer}.gate_up"}, [0], 3, column=1, transposed=True),
    *stacked({"layers.{layer}.x.{expert}": "blocks.{layer}.all_x"}, [2], 2),
    *expand({"q": "turned"}, heads=RotaryRows(heads=2, plain=1, rotated=4)),
    *expand({"bias": "exact"}, exact=True),
    *expand({"down": "doubled"}, scale=2.0),
    Zeros("zeros", (1, 4)),
]
OURS = {
    "embedding.weight": torch.arange(16.0).view(8, 2),
    "layers.0.w": torch.randn(3, 4, 2),
    "layers.2.w": torch.randn(3, 4, 2),
    "layers.2.x.0": torch.randn(2),
    "layers.2.x.1": torch.randn(2),
    "layers.0.gate": torch.randn(3, 4, 2),
    "layers.0.up": torch.randn(3, 4, 2),
    "q": torch.arange(10.0),
    "bias": torch.randn(3),
    "down": torch.randn(2, 2),
}
SHAPES = {name: tuple(tensor.shape) for name, tensor in OURS.items()}


def theirs_of(links: Links = LINKS, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return dict(to_theirs(links, InMemoryTensors(OURS), dtype))


def test_templates_expand_over_layers_and_experts() -> None:
    assert expand({"a.{layer}": "b.{layer}.{expert}"}, [1], 2) == [
        Link("a.1", "b.1.0", 0),
        Link("a.1", "b.1.1", 1),
    ]
    assert expand({"a.{layer}.{expert}": "b.{expert}"}, [1], 2) == [
        Link("a.1.0", "b.0"),
        Link("a.1.1", "b.1"),
    ]
    assert expand({"a": "b"}, rows=7) == [Link("a", "b", None, 7)]
    assert stacked({"a": "b"}, [0], 2) == [
        Link("a", "b", 0, their_expert=0),
        Link("a", "b", 1, their_expert=1),
    ]
    assert stacked({"a.{expert}": "b"}, [0], 2) == [
        Link("a.0", "b", their_expert=0),
        Link("a.1", "b", their_expert=1),
    ]


def test_every_way_of_writing_a_tensor() -> None:
    theirs = theirs_of()
    assert torch.equal(theirs["embed.weight"], OURS["embedding.weight"][:5])
    assert torch.equal(theirs["blocks.2.e.1.w"], OURS["layers.2.w"][1])
    assert torch.equal(theirs["blocks.0.gate_up"][1, :, 0::2], OURS["layers.0.gate"][1].T)
    assert torch.equal(theirs["blocks.0.gate_up"][1, :, 1::2], OURS["layers.0.up"][1].T)
    assert torch.equal(
        theirs["blocks.2.all_x"], torch.stack([OURS["layers.2.x.0"], OURS["layers.2.x.1"]])
    )
    assert theirs["turned"].tolist() == [
        0,
        1,
        3,
        2,
        4,
        5,
        6,
        8,
        7,
        9,
    ]  # in each head the pairs (1, 3) and (2, 4) stand side by side
    assert torch.equal(theirs["doubled"], 2 * OURS["down"]) and not theirs["zeros"].any()


def test_forms_are_known_before_the_numbers_and_are_theirs() -> None:
    forms = their_forms(LINKS, InMemoryTensors(OURS), torch.bfloat16)
    written = theirs_of(dtype=torch.bfloat16)
    assert list(forms) == list(written)
    assert all(
        forms[name] == TensorForm(tensor.dtype, tuple(tensor.shape))
        for name, tensor in written.items()
    )
    assert {name for name, form in forms.items() if form.dtype == torch.float32} == {"exact"}


def test_the_map_used_backwards_gives_the_same_tensors() -> None:
    back = dict(to_ours(LINKS, InMemoryTensors(theirs_of()), SHAPES))
    assert back.keys() == OURS.keys()
    assert not back["embedding.weight"][5:].any(), "padding is zero"
    assert torch.equal(back["embedding.weight"][:5], OURS["embedding.weight"][:5])
    assert all(
        torch.equal(back[name], tensor)
        for name, tensor in OURS.items()
        if name != "embedding.weight"
    )


def test_a_swapped_pair_of_experts_does_not_come_back_the_same() -> None:
    theirs = theirs_of()
    theirs["blocks.0.e.0.w"], theirs["blocks.0.e.1.w"] = (
        theirs["blocks.0.e.1.w"],
        theirs["blocks.0.e.0.w"],
    )
    assert not torch.equal(
        dict(to_ours(LINKS, InMemoryTensors(theirs), SHAPES))["layers.0.w"], OURS["layers.0.w"]
    )


def test_rows_that_are_not_turned_back_do_not_come_back_the_same() -> None:
    plain = [replace(link, heads=None) if isinstance(link, Link) else link for link in LINKS]
    assert not torch.equal(
        dict(to_ours(plain, InMemoryTensors(theirs_of()), SHAPES))["q"], OURS["q"]
    )


def test_a_tensor_without_a_name_or_a_name_without_a_tensor_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no name for the tensor 'extra'"):
        check_names(LINKS, InMemoryTensors({**OURS, "extra": torch.zeros(1)}))
    check_names(LINKS, InMemoryTensors({**OURS, "extra": torch.zeros(1)}), left_out=["extra"])
    with pytest.raises(CheckpointError, match=r"has no tensor 'layers\.2\.x\.1'"):
        check_names(
            LINKS,
            InMemoryTensors(
                {name: tensor for name, tensor in OURS.items() if name != "layers.2.x.1"}
            ),
        )
    with pytest.raises(CheckpointError, match=r"no tensor 'embed\.weight'"):
        dict(to_ours(LINKS, InMemoryTensors({}), SHAPES))
    with pytest.raises(
        CheckpointError, match=r"'embed\.weight' has the shape \[4, 2\] instead of \[5, 2\]"
    ):
        dict(
            to_ours(
                LINKS, InMemoryTensors({**theirs_of(), "embed.weight": torch.zeros(4, 2)}), SHAPES
            )
        )
