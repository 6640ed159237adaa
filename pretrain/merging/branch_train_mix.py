"""Branch-Train-MiX (Sukhbaatar et al. 2024): dense models become one mixture of experts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from pretrain.checkpoint.comparison import check_same_function
from pretrain.checkpoint.experts import moe_prefixes, routed_moe
from pretrain.checkpoint.layout import read_recipe
from pretrain.checkpoint.lazy_weights import StoredWeights
from pretrain.core.errors import CheckpointError, ConfigError
from pretrain.merging.assembly import RouterStart, check_overrides, moe_layer
from pretrain.merging.blend import blended, check_same_tensors, uniform_rates
from pretrain.model.config import ModelConfig


def check_branches(stores: Sequence[StoredWeights], target: ModelConfig) -> None:
    """Raises an error if the models are not dense ones of one shape, or do not fit the recipe."""
    models = [read_recipe(store.folder).model for store in stores]
    for store, model in zip(stores, models, strict=True):
        if model.routed_layers:
            raise CheckpointError(
                f"layer {model.routed_layers[0]} of {store.folder} is a mixture of experts already:"
                " give dense models"
            )
    check_same_function(models, [str(store.folder) for store in stores])
    check_same_tensors(stores)
    first = models[0]
    check_overrides(first, target)
    moe = routed_moe(target)
    if moe.num_experts % len(stores):
        raise ConfigError(
            f"{len(stores)} models cannot share {moe.num_experts} experts evenly: change"
            " model.moe.num_experts"
        )
    if moe.moe_intermediate_size != first.intermediate_size:
        raise ConfigError(
            f"model.moe.moe_intermediate_size ({moe.moe_intermediate_size}) must be the models'"
            f" intermediate_size ({first.intermediate_size})"
        )


def mixed_tensors(
    stores: Sequence[StoredWeights], target: ModelConfig, router: RouterStart
) -> Iterator[tuple[str, Tensor]]:
    """Yields every tensor of the mixture.

    Expert e of a layer is the feed-forward of model e % n; routers are new, and all other tensors
    are averaged.
    """
    check_branches(stores, target)
    rates = uniform_rates(len(stores))
    taken = set()
    for prefix in moe_prefixes(target):
        names = target.feed_forward.parameter_names
        taken |= {f"{prefix}.{name}" for name in names}
        branches = [{name: store[f"{prefix}.{name}"] for name in names} for store in stores]
        experts = [
            branches[expert % len(branches)] for expert in range(routed_moe(target).num_experts)
        ]
        residual = {name: blended(branches, rates, name) for name in names}
        yield from moe_layer(experts, residual, prefix, target, router)
    yield from ((name, blended(stores, rates, name)) for name in stores[0] if name not in taken)
