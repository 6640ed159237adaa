"""The rule for how tokens travel to their experts."""

from __future__ import annotations

from pretrain.config.recipe import Recipe
from pretrain.core.errors import ConfigError
from pretrain.model.moe.config import DroplessMoEConfig
from pretrain.model.moe.exchange.config import exchange_section


def exchange_fits(recipe: Recipe) -> None:
    """Rows of one token may be joined only if nobody needs the output of a single expert."""
    moe, dropout = recipe.model.moe, recipe.model.dropout.expert
    if not isinstance(moe, DroplessMoEConfig):
        return
    exchange = exchange_section(moe.exchange)
    field = f"{exchange.field}={moe.exchange}"
    if not exchange.forms_expert_outputs:
        if moe.deduplicate is False:
            raise ConfigError(
                f"model.moe.deduplicate=false does not go with {field}, which sends a token to a "
                f"rank once: leave it out, or use {exchange.field}={exchange.default}"
            )
        if recipe.parallel.ep_size == 1:
            raise ConfigError(
                f"{field} would move nothing, because parallel.ep_size is 1: leave it out, or set "
                "parallel.ep_size"
            )
    if dropout and (moe.deduplicate or not exchange.forms_expert_outputs):
        joined = "model.moe.deduplicate=true" if moe.deduplicate else field
        raise ConfigError(
            f"model.dropout.expert={dropout} does not go with {joined}, which sums the outputs of "
            "a token's experts where they are computed: leave one of them out"
        )
