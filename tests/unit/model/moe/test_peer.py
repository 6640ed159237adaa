"""PEER: every expert is found, exactly the best are, keys and queries learn, and no token sees a
later one.

"The published framework" is Foundation, the PEER + MLA framework (llm720): its mistakes are named
where a test forbids them, those of its latent attention in test_mla.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.model.decoder import DecoderLM
from pretrain.model.init import initialize
from pretrain.model.moe import peer as peer_layer
from pretrain.model.moe.base import RoutingRecord
from pretrain.model.moe.config import PEERConfig
from pretrain.model.moe.peer import PEER
from pretrain.model.moe.product_keys import (
    ProductKeys,
    RunningStatistics,
    best_products,
    product_scores,
)
from tests.support.tiny_model import RECOMPUTATIONS, random_tokens, tiny_model

SIZES = [(7,), (4, 5), (3, 4, 2), (2, 2, 3, 2)]
FORMS = {
    "gated": "model.feed_forward.kind=swiglu",
    "one product": "model.feed_forward.kind=gelu",
    "twice as wide": "model.feed_forward={kind: product_swiglu}",
}


def peer(sizes: tuple[int, ...], *overrides: str, width: int = 1) -> PEER:
    """The PEER layer of a tiny model with weights of size 1."""
    section = (
        f"kind: peer, product_key_sizes: {list(sizes)}, query_dim: 24, num_heads: 2, top_k: 3,"
        f" moe_intermediate_size: {width}"
    )
    model = tiny_model(f"model.moe={{{section}}}", "model.initializer_range=0.5", *overrides)
    layer = model.layers[0].feed_forward
    assert isinstance(layer, PEER)
    return layer


def products(sizes: tuple[int, ...]) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Every expert's number and its sub-keys: the last dimension counts fastest."""
    return enumerate(itertools.product(*(range(size) for size in sizes)))


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(1, 40), st.integers(0, 2**31)
)
@settings(max_examples=60, deadline=None)
def test_the_best_products_are_those_of_brute_force(
    sizes: list[int], top_k: int, seed: int
) -> None:
    """The published framework cuts its candidates between dimensions by number, and loses some of
    the best.
    """
    top_k = min(top_k, math.prod(sizes))
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.randn(5, 2, size, generator=generator) for size in sizes]
    everything = sum(
        part.view(5, 2, *(size if axis == d else 1 for axis, size in enumerate(sizes)))
        for d, part in enumerate(scores)
    ).flatten(2)
    ids = best_products(scores, top_k)
    assert torch.equal(
        ids.sort(dim=-1).values, everything.topk(top_k, dim=-1).indices.sort(dim=-1).values
    )
    torch.testing.assert_close(product_scores(scores, ids), everything.topk(top_k, dim=-1).values)


@pytest.mark.parametrize("sizes", SIZES)
def test_every_expert_is_reached(sizes: tuple[int, ...]) -> None:
    """The published framework numbers its experts i + j: of 1,024 x 1,024 it reaches 2,047."""
    for number, digits in products(sizes):
        scores = [
            torch.full((1, size), -1.0).index_fill_(1, torch.tensor(digit), 1.0)
            for size, digit in zip(sizes, digits, strict=True)
        ]
        assert best_products(scores, 1).item() == number


def test_the_million_is_reached() -> None:
    scores = [torch.zeros(1, 1024).index_fill_(1, torch.tensor(1023), 1.0) for _ in range(2)]
    assert best_products(scores, 1).item() == 1024 * 1024 - 1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("width", [1, 3])
def test_the_layer_is_its_definition(sizes: tuple[int, ...], form: str, width: int) -> None:
    """Expert by expert and token by token: scores of every product, softmax over a head's best,
    each expert a feed-forward of its own.

    The published framework lays out the rows of experts wider than 1 in one way on the way up and
    in another on the way down.
    """
    layer, x_TD = peer(sizes, FORMS[form], width=width).eval(), torch.randn(6, 32)
    experts, keys = layer.experts, layer.retrieval
    scores = keys.scores(x_TD)
    expected = torch.zeros_like(x_TD)
    for token, head in itertools.product(range(6), range(2)):
        totals = torch.stack(
            [
                sum(scores[d][token, head, digit] for d, digit in enumerate(digits))
                for _, digits in products(sizes)
            ]
        )
        best = totals.topk(3)
        for number, weight in zip(best.indices.tolist(), best.values.softmax(dim=0), strict=True):
            up = experts.up.weight[number] @ x_TD[token]
            gate = experts.gate.weight[number] @ x_TD[token] if experts.gate is not None else None
            hidden = experts.kind.activate(
                experts.form, *((gate, up) if gate is not None else (up, up[:0]))
            )
            expected[token] += weight * (hidden @ experts.down.weight[number])
    torch.testing.assert_close(layer(x_TD[None])[0][0], expected, atol=1e-4, rtol=1e-4)


class LargestTensor(TorchDispatchMode):
    """How many numbers the largest result of any operation has."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def test_the_scores_of_all_experts_are_never_formed() -> None:
    """An earlier form of the published framework computes all: a million per token and head."""
    keys = peer((128, 128)).retrieval
    with LargestTensor() as largest:
        keys(torch.randn(6, 32))
    assert largest.numel <= 6 * 2 * 128 < 6 * 2 * 128 * 128


def test_keys_and_queries_learn() -> None:
    """The published framework reads its keys' ``.data``: they get no gradient."""
    layer = peer((4, 5)).train()
    layer(torch.randn(2, 8, 32))[0].square().sum().backward()
    for parameter in (layer.retrieval.keys_0, layer.retrieval.keys_1, layer.retrieval.query.weight):
        assert parameter.grad is not None and parameter.grad.abs().max() > 0


def test_weights_of_a_head_sum_to_one_and_repeat_a_recorded_choice() -> None:
    retrieval, x_TD, record = peer((4, 5)).retrieval, torch.randn(6, 32), RoutingRecord()
    first = retrieval(x_TD, record)
    torch.testing.assert_close(first.weights_ThK.sum(dim=-1), torch.ones(6, 2))
    repeated = retrieval(torch.randn(6, 32), record)
    assert torch.equal(repeated.ids_ThK, first.ids_ThK) and not torch.equal(
        repeated.weights_ThK, first.weights_ThK
    )


@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm", "batch_norm", "none"])
def test_no_query_norm_shows_later_tokens_in_training(norm: str) -> None:
    """The published framework norms queries over the batch in training: a token's experts then
    depend on later tokens.
    """
    layer = peer((4, 5), f"model.moe.query_norm={norm}").train()
    x_BSD = torch.randn(1, 8, 32)
    changed = x_BSD.clone()
    changed[:, -1] += 5.0
    assert torch.equal(layer(x_BSD)[0][:, :-1], layer(changed)[0][:, :-1])


def test_a_batch_of_its_own_statistics_would_be_noticed() -> None:
    layer = peer((4, 5), "model.moe.query_norm=layer_norm").train()
    layer.retrieval.norm = torch.nn.Sequential(
        torch.nn.Flatten(0, 1), torch.nn.BatchNorm1d(24), torch.nn.Unflatten(0, (-1, 2))
    )
    x_BSD = torch.randn(1, 8, 32)
    changed = x_BSD.clone()
    changed[:, -1] += 5.0
    assert not torch.equal(layer(x_BSD)[0][:, :-1], layer(changed)[0][:, :-1])


def test_running_statistics_become_those_of_the_tokens() -> None:
    statistics, rows = RunningStatistics(4), torch.randn(512, 4) * 3 + 2
    for _ in range(200):
        statistics.observe(rows[:256])
        statistics.observe(rows[256:])
        statistics.absorb(lambda seen: seen)
    torch.testing.assert_close(statistics.mean, rows.mean(dim=0))
    torch.testing.assert_close(
        statistics.variance, rows.var(dim=0, correction=0), rtol=1e-4, atol=1e-4
    )
    before = statistics.mean.clone()
    statistics.absorb(lambda seen: seen)  # nothing seen since
    assert torch.equal(statistics.mean, before)


def test_a_recomputed_block_counts_its_tokens_once() -> None:
    layers = []
    for recomputed in RECOMPUTATIONS:
        section = (
            "{kind: peer, product_key_sizes: [4, 5], query_dim: 24, num_heads: 2, top_k: 3,"
            " query_norm: batch_norm}"
        )
        model = tiny_model(f"model.moe={section}", activation_checkpointing=recomputed).train()
        tokens = random_tokens(2, 9)
        model(tokens[:, :-1], tokens[:, 1:], 1.0).loss.backward()
        layers.append(model.layers[0].feed_forward)
    for layer in layers:
        assert (
            layer.usage_E.sum() == 2 * 8 * 2 * 3
            and layer.retrieval.norm.statistics.seen[0, 0] == 2 * 8 * 2
        )
        assert torch.equal(layers[0].usage_E, layer.usage_E)


def test_a_part_of_the_experts_starts_with_the_same_numbers() -> None:
    """Streams of random numbers belong to blocks of experts, wherever the ranks' parts begin."""
    section = "{kind: peer, product_key_sizes: [6, 4], query_dim: 24, num_heads: 2, top_k: 3}"
    whole = tiny_model(f"model.moe={section}")
    original, peer_layer.VALUES_A_STREAM = (
        peer_layer.VALUES_A_STREAM,
        32 * 5,
    )  # five experts a stream
    try:
        initialize(whole, seed=3)
        for part in range(3):
            model = DecoderLM(whole.config, ep_size=3, ep_rank=part)
            initialize(model, seed=3)
            for mine, all_of_them in zip(
                model.layers[0].feed_forward.experts.parameters(),
                whole.layers[0].feed_forward.experts.parameters(),
                strict=True,
            ):
                assert torch.equal(mine, all_of_them[part * 8 : (part + 1) * 8])
    finally:
        peer_layer.VALUES_A_STREAM = original


def test_a_query_that_no_dimension_divides_is_refused() -> None:
    with pytest.raises(ValueError, match="query_dim \\(10\\) is no multiple of the 3 dimensions"):
        PEERConfig(kind="peer", product_key_sizes=(2, 2, 2), query_dim=10, top_k=2)
    with pytest.raises(ValueError, match="top_k is 16, but there are only 4 experts"):
        PEERConfig(kind="peer", product_key_sizes=(2, 2), query_dim=10)


def test_product_keys_are_shared_by_all_heads_and_normed_queries_score_about_one() -> None:
    keys = peer((64, 64)).retrieval
    assert isinstance(keys, ProductKeys)
    assert [tuple(keys.get_parameter(f"keys_{d}").shape) for d in range(2)] == [(64, 12), (64, 12)]
    assert 0.5 < torch.stack(keys.scores(torch.randn(50, 32))).std() < 2.0
