from __future__ import annotations

import pytest
import torch

from pretrain.config.errors import CheckpointError
from pretrain.export.name_map import Link, expand, to_ours, to_theirs, without_padding

LINKS = [
    *expand({"embedding.weight": "embed.weight"}, rows=5),
    *expand({"layers.{layer}.w": "blocks.{layer}.e.{expert}.w"}, layers=[0, 2], num_experts=3),
    *expand({"layers.{layer}.x.{expert}": "blocks.{layer}.x.{expert}"}, layers=[2], num_experts=2),
]
OURS = {
    "embedding.weight": torch.arange(16.0).view(8, 2),
    "layers.0.w": torch.randn(3, 4, 2),
    "layers.2.w": torch.randn(3, 4, 2),
    "layers.2.x.0": torch.randn(2),
    "layers.2.x.1": torch.randn(2),
}


def test_templates_expand_over_layers_and_experts() -> None:
    assert expand({"a.{layer}": "b.{layer}.{expert}"}, [1], 2) == [Link("a.1", "b.1.0", 0), Link("a.1", "b.1.1", 1)]
    assert expand({"a.{layer}.{expert}": "b.{expert}"}, [1], 2) == [Link("a.1.0", "b.0"), Link("a.1.1", "b.1")]
    assert expand({"a": "b"}, rows=7) == [Link("a", "b", None, 7)]


def test_experts_are_taken_apart_and_vocabulary_padding_is_cut() -> None:
    theirs = to_theirs(LINKS, OURS)
    assert len(theirs) == 1 + 2 * 3 + 2
    assert torch.equal(theirs["embed.weight"], OURS["embedding.weight"][:5])
    assert torch.equal(theirs["blocks.2.e.1.w"], OURS["layers.2.w"][1])
    assert len({tensor.untyped_storage().data_ptr() for tensor in theirs.values()}) == len(theirs)


def test_the_map_used_backwards_gives_the_same_tensors() -> None:
    back = to_ours(LINKS, to_theirs(LINKS, OURS))
    expected = without_padding(LINKS, OURS)
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in expected.items())


def test_a_swapped_pair_of_experts_does_not_come_back_the_same() -> None:
    theirs = to_theirs(LINKS, OURS)
    theirs["blocks.0.e.0.w"], theirs["blocks.0.e.1.w"] = theirs["blocks.0.e.1.w"], theirs["blocks.0.e.0.w"]
    assert not torch.equal(to_ours(LINKS, theirs)["layers.0.w"], OURS["layers.0.w"])


def test_a_tensor_without_a_name_or_a_name_without_a_tensor_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no name for the tensor 'extra'"):
        to_theirs(LINKS, {**OURS, "extra": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"has no tensor 'layers\.2\.x\.1'"):
        to_theirs(LINKS, {name: tensor for name, tensor in OURS.items() if name != "layers.2.x.1"})
    with pytest.raises(CheckpointError, match=r"no tensor 'embed\.weight'"):
        to_ours(LINKS, {})
