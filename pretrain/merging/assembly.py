"""Builds MoE layers from dense feed-forwards, with new routers and shared experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.checkpoint.experts import DOWN, Expert, routed_moe, router_names, write_experts
from pretrain.checkpoint.weights_only import tensor_shapes
from pretrain.config.differences import differences
from pretrain.config.load import apply_override, validate_recipe
from pretrain.config.recipe import Recipe
from pretrain.config.rules.routers import deaf_router
from pretrain.core.errors import ConfigError
from pretrain.core.plugins import add_loaded_plugins
from pretrain.core.section import Effect
from pretrain.core.seeds import derived_seed
from pretrain.model.config import ModelConfig
from pretrain.model.widths import width_ratio


@dataclass(frozen=True)
class RouterStart:
    """How a new router is initialized.

    Attributes:
        std: of the normal distribution they are drawn from; 0 makes them zero.
        group: neighbouring experts that get the same row, so that a token chooses all of them or
            none.
        seed: of everything that is drawn.
    """

    std: float
    group: int = 1
    seed: int = 0


def random_normal(shape: Sequence[int], seed: int, name: str) -> Tensor:
    """Draws from N(0, 1) in fp32, from a random stream that only this ``name`` has."""
    return torch.empty(*shape).normal_(generator=random_stream(seed, name))


def random_stream(seed: int, name: str) -> torch.Generator:
    """A generator for one name, so that what one tensor draws does not depend on the others."""
    return torch.Generator().manual_seed(derived_seed(f"{seed}/{name}"))


def derived_recipe(
    recipe: Recipe, suffix: str, overrides: Sequence[str] = (), **model: object
) -> Recipe:
    """A recipe for weights that were made from those of ``recipe``.

    Sections of its model are replaced by ``model``, then ``overrides`` (``a.b=c``) are applied. The
    name gets ``suffix``, so that the new run has another folder; the data stay the same.

    Raises:
        ConfigError: for an override that is wrong, or sections that contradict each other.
    """
    # All fields, defaults included: a later change of a default must not change this model.
    content = recipe.model_dump(mode="json")
    content |= {
        "name": recipe.name + suffix,
        "run_path": None,
        "initial_weights": None,
        "initial_weights_partial": False,
    }
    content["data"]["path"] = recipe.data.path if recipe.data.corpora else recipe.data_path
    content["model"] |= model
    for override in overrides:
        apply_override(content, override)
    add_loaded_plugins(content)
    return validate_recipe(content, "the new recipe")


def moe_recipe(
    dense: Recipe, suffix: str, moe: Mapping[str, object], overrides: Sequence[str]
) -> Recipe:
    """:func:`derived_recipe` with every feed-forward a mixture of experts.

    Raises:
        ConfigError: as there, and for a new router that training could not teach.
    """
    recipe = derived_recipe(
        dense, suffix, overrides, layer_pattern={"kind": "all_moe"}, moe=dict(moe)
    )
    if deaf := deaf_router(recipe.model):
        raise ConfigError(deaf)
    return recipe


def check_overrides(before: ModelConfig, after: ModelConfig) -> None:
    """Checks that the weights that are kept compute the same with the new recipe as before.

    The mixture of experts is put together anew, so that its section may say anything.

    Raises:
        ConfigError: naming every other field that overrides have changed, and both values.
    """
    kept = [one for one in differences(before, after) if one.effect is not Effect.NONE]
    kept = [one for one in kept if not one.path.startswith(("model.moe.", "model.layer_pattern"))]
    if kept:
        fields = ", ".join(
            f"{one.path} ({one.values[0]} before, {one.values[1]} now)" for one in kept
        )
        raise ConfigError(
            f"--set changes {fields}, and the weights that are taken over would compute something"
            " else: leave it out here; what training can adapt to may be set in the run that"
            " starts from the result"
        )


def moe_layer(
    experts: Sequence[Expert],
    residual: Expert,
    prefix: str,
    model: ModelConfig,
    router: RouterStart,
) -> Iterator[tuple[str, Tensor]]:
    """Yields every tensor of one MoE layer.

    Shared experts start with an output of zero. Router biases, noise and balancing biases start at
    zero, and so does the coefficient of a residual expert, which gives both sides the same weight.

    Args:
        experts: all routed experts.
        residual: the dense expert in parallel with the routed ones, if the model has one (PR-MoE).
        prefix: of the layer's feed-forward, such as ``layers.3.feed_forward``.
    """
    routed = write_experts(experts, prefix, model)
    yield from routed.items()
    dense, _ = tensor_shapes(model)
    router_matrix = router_names(prefix, routed_moe(model))[0]
    for name, shape in dense.items():
        if not name.startswith(f"{prefix}.") or name in routed:
            continue
        below = name.removeprefix(f"{prefix}.")
        if below.startswith("mlp."):
            yield name, residual[below.removeprefix("mlp.")]
        elif name == router_matrix:
            # Experts of one group start with one row, so that a token chooses all of them or none.
            rows = (
                random_normal((shape[0] // router.group, shape[1]), router.seed, name) * router.std
            )
            yield name, rows.repeat_interleave(router.group, dim=0)
        elif (
            below.startswith("shared.feed_forward")
            and name.endswith(".weight")
            and DOWN not in name
        ):
            yield (
                name,
                random_normal(shape, router.seed, name)
                * (model.initializer_range / width_ratio(model) ** 0.5),
            )
        else:
            yield name, torch.zeros(shape)
