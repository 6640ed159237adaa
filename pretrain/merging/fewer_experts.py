"""Fewer experts in every layer: the least used are left out, or the most alike become one.

Folding is hierarchical clustering with average linkage (Chen et al. 2024, "Retraining-free merging
of sparse MoE via hierarchical clustering"), and what a cluster becomes is the mean of its experts,
weighted by how often each was chosen (Li et al. 2024, "Merge, then compress"). Hidden units are not
aligned, so that experts that differ only in the order of their units count as different. Pruning
goes by usage (Muzio et al. 2024, "SEER-MoE").

Softmax weights that are not renormalised grow if an expert is removed, even an unused one: its
probability is shared among the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor

from pretrain.checkpoint.experts import (
    expert_names,
    moe_prefixes,
    read_experts,
    routed_moe,
    router_names,
    write_experts,
)
from pretrain.core.errors import ConfigError
from pretrain.merging.blend import blended, weighted_rates
from pretrain.model.config import ModelConfig
from pretrain.model.moe.config import RoutedMoE

# The experts that become one, by their numbers, for each one that is left.
Clusters = list[list[int]]


def pruned(usage_E: Tensor, keep: int, moe: RoutedMoE) -> Clusters:
    """The ``keep`` most used experts, each alone, in order; the same number of every group."""
    return _in_groups(
        moe,
        keep,
        lambda numbers, count: [
            [number] for number in sorted(sorted(numbers, key=lambda n: -float(usage_E[n]))[:count])
        ],
    )


def folded(similarity_EE: Tensor, keep: int, moe: RoutedMoE) -> Clusters:
    """Joins the most alike experts until ``keep`` clusters are left, evenly over groups."""
    return _in_groups(
        moe, keep, lambda numbers, count: _agglomerated(similarity_EE, numbers, count)
    )


def _in_groups(moe: RoutedMoE, keep: int, choose: Callable[[list[int], int], Clusters]) -> Clusters:
    count = moe.router.groups.num_groups if moe.router.groups is not None else 1
    if not 1 <= keep <= moe.num_experts or keep % count:
        groups = f" and a multiple of the router's {count} groups" if count > 1 else ""
        raise ConfigError(f"--keep is {keep}: give 1 to {moe.num_experts} experts{groups}")
    size = moe.num_experts // count
    return [
        cluster
        for group in range(count)
        for cluster in choose(list(range(group * size, (group + 1) * size)), keep // count)
    ]


def _agglomerated(similarity_EE: Tensor, numbers: list[int], keep: int) -> Clusters:
    clusters = [[number] for number in numbers]
    while len(clusters) > keep:
        first, second = max(
            combinations(range(len(clusters)), 2),
            key=lambda pair: _linkage(similarity_EE, clusters[pair[0]], clusters[pair[1]]),
        )
        # first < second, so that popping does not move the cluster that grows.
        clusters[first] += clusters.pop(second)
    return [sorted(cluster) for cluster in clusters]


def _linkage(similarity_EE: Tensor, first: list[int], second: list[int]) -> float:
    return float(similarity_EE[first][:, second].mean())


def regrouped_tensors(
    stored: Mapping[str, Tensor],
    before: ModelConfig,
    after: ModelConfig,
    clusters: Sequence[Clusters],
    usage_LE: Tensor,
) -> Iterator[tuple[str, Tensor]]:
    """Yields every tensor of the smaller model; clusters become means, weighted by usage.

    Args:
        clusters: for each layer of ``before.routed_layers``.
        usage_LE: how often each expert was chosen.
    """
    moe = routed_moe(before)
    taken: set[str] = set()
    for prefix, layer_clusters, usage_E in zip(
        moe_prefixes(before), clusters, usage_LE, strict=True
    ):
        experts = read_experts(stored, prefix, before)
        rates = [
            _rates([float(usage_E[number]) for number in cluster]) for cluster in layer_clusters
        ]
        merged = [
            {
                name: blended([experts[number] for number in cluster], rate, name)
                for name in experts[0]
            }
            for cluster, rate in zip(layer_clusters, rates, strict=True)
        ]
        yield from write_experts(merged, prefix, after).items()
        for name in router_names(prefix, moe):
            # The router's row of an expert is merged like the expert, with the same weights.
            rows = [{name: row} for row in stored[name]]
            yield (
                name,
                torch.stack(
                    [
                        blended([rows[n] for n in cluster], rate, name)
                        for cluster, rate in zip(layer_clusters, rates, strict=True)
                    ]
                ),
            )
        taken |= {*expert_names(prefix, before), *router_names(prefix, moe)}
    yield from ((name, stored[name]) for name in stored if name not in taken)


def _rates(usage: list[float]) -> list[float]:
    """Experts that were never chosen weigh the same."""
    # Weights of zero have no sum to divide by.
    return weighted_rates(usage if sum(usage) else [1.0] * len(usage))
