"""Our PEER layer against the one of the package PEER-pytorch (MIT), on equal weights.

It needs the package, which nothing else here does: ``pip install PEER-pytorch``. Its keys are
separate for each head and ours are shared, so each of its heads gets ours; it knows square products
of two dimensions only; and by default its scores do not compete (one expert a head, by ReLU), while
He 2024 and we take the softmax over the best: ``non_competing_scores=False``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pretrain.model.moe.peer import PEER
from tests.support.tiny_model import random_tensor, tiny_model

peer_pytorch: Any = pytest.importorskip("PEER_pytorch", reason="pip install PEER-pytorch")

SIDE, HEADS, TOP_K, PART, B, S = 9, 3, 4, 10, 2, 7


def ours() -> PEER:
    section = (
        f"kind: peer, product_key_sizes: [{SIDE}, {SIDE}], query_dim: {2 * PART}, query_bias: false,"
        f" query_norm: none, num_heads: {HEADS}, top_k: {TOP_K}, moe_intermediate_size: 1"
    )
    model = tiny_model(
        f"model.moe={{{section}}}",
        "model.feed_forward={kind: gelu}",
        "model.initializer_range=0.5",
    )
    layer = model.layers[0].feed_forward
    assert isinstance(layer, PEER) and layer.experts.gate is None
    return layer


def theirs(layer: PEER, **options: Any) -> Any:
    """Their layer with our weights."""
    hidden_size = layer.retrieval.query.in_features
    other = peer_pytorch.PEER(
        hidden_size,
        heads=HEADS,
        num_experts=SIDE * SIDE,
        num_experts_per_head=TOP_K,
        dim_key=PART,
        **options,
    )
    with torch.no_grad():
        # Their rows count dimension, head, element; ours head, dimension, element.
        rows = layer.retrieval.query.weight.unflatten(0, (HEADS, 2, PART))
        other.to_queries[0].weight.copy_(rows.transpose(0, 1).flatten(0, 2))
        keys = torch.stack([layer.retrieval.keys_0, layer.retrieval.keys_1], dim=1)
        other.keys.copy_(keys.expand(HEADS, -1, -1, -1))
        # What they call down is the product with the token, our up.
        other.weight_down_embed.weight.copy_(layer.experts.up.weight[:, 0])
        other.weight_up_embed.weight.copy_(layer.experts.down.weight[:, 0])
    return other


def test_outputs_and_gradients_equal_those_of_the_package() -> None:
    layer = ours()
    other = theirs(layer, non_competing_scores=False)
    x_BSD = random_tensor(B, S, layer.retrieval.query.in_features, seed=1)
    y_BSD, _ = layer(x_BSD)
    expected_BSD = other(x_BSD)
    torch.testing.assert_close(y_BSD, expected_BSD, atol=1e-5, rtol=1e-5)
    weights = random_tensor(*y_BSD.shape, seed=2).detach()
    mine = torch.autograd.grad(
        (y_BSD * weights).sum(),
        [
            x_BSD,
            layer.retrieval.query.weight,
            layer.retrieval.keys_0,
            layer.retrieval.keys_1,
            layer.experts.up.weight,
            layer.experts.down.weight,
        ],
    )
    x, query, keys, down, up = torch.autograd.grad(
        (expected_BSD * weights).sum(),
        [
            x_BSD,
            other.to_queries[0].weight,
            other.keys,
            other.weight_down_embed.weight,
            other.weight_up_embed.weight,
        ],
    )
    # Our keys are shared by the heads: their gradient is the sum over the heads'.
    shared = keys.sum(dim=0)
    rows = query.unflatten(0, (2, HEADS, PART)).transpose(0, 1).flatten(0, 2)
    wanted = [x, rows, shared[:, 0], shared[:, 1], down[:, None], up[:, None]]
    for found, one in zip(mine, wanted, strict=True):
        torch.testing.assert_close(found, one, atol=1e-5, rtol=1e-5)
        assert found.abs().max() > 0


def test_its_default_of_scores_that_do_not_compete_is_another_layer() -> None:
    layer = ours()
    x_BSD = random_tensor(B, S, layer.retrieval.query.in_features, seed=1).detach()
    with torch.no_grad():
        assert (layer(x_BSD)[0] - theirs(layer)(x_BSD)).abs().max() > 1e-2
