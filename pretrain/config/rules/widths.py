"""Rules about muP (Yang et al. 2022): its base widths, and what it has learning rates for."""

from __future__ import annotations

from pretrain.config.recipe import Recipe
from pretrain.core.errors import ConfigError
from pretrain.core.registry import kind_name, kinds_of
from pretrain.model.widths import OFTEN_FIXED, base_model, widths
from pretrain.optim.config import Optimizer


def base_fits_the_model(recipe: Recipe) -> None:
    """The base must have the model's widths and no others, and its sizes must fit together."""
    model = recipe.model
    base_widths = model.initialization.base_widths
    if base_widths is None:
        return
    sizes = widths(model)
    base = base_widths.model_dump(exclude_none=True)
    # The dense width of a model whose layers are all MoE is read by no layer.
    used = dict(sizes)
    if len(model.moe_layers) == model.num_hidden_layers:
        used.pop("intermediate_size", None)
    if missing := [name for name in used if name not in base and name not in OFTEN_FIXED]:
        raise ConfigError(
            f"model.initialization.base.{missing[0]} is missing: give the base model's, "
            f"or {sizes[missing[0]]} as here if it does not grow with the width"
        )
    if unknown := [name for name in base if name not in sizes]:
        raise ConfigError(
            f"model.initialization.base.{unknown[0]} is given, but the model has no {unknown[0]}: "
            "leave it out"
        )
    base_model(model, base_widths).attention.check("model.initialization.base")


def mup_knows_the_parts(recipe: Recipe) -> None:
    """MuP needs learning rates for experts and optimizer, and a norm that scales logits."""
    model = recipe.model
    optimizer = recipe.optimizer
    if model.initialization.base_widths is None:
        return
    if model.moe is not None and model.moe_layers and not model.moe.scales_with_width:
        raise ConfigError(
            f"model.initialization.kind=mup does not know model.moe.kind={model.moe.kind}, whose "
            "experts are rows of tables with one learning rate: use "
            "model.initialization.kind=standard, or experts of kind dropless or deepspeed"
        )
    if not optimizer.scales_with_width:
        able = [
            kind_name(kind)
            for kind in kinds_of(Optimizer)  # type: ignore[type-abstract]
            if kind.scales_with_width
        ]
        raise ConfigError(
            "model.initialization.kind=mup has learning rates for optimizers like Adam, not for "
            f"optimizer.kind={optimizer.kind}: use {' or '.join(able)}, or "
            "model.initialization.kind=standard"
        )
    # A head that is shared or factorised has no scale, so the final norm has to scale the logits.
    shared = "tie_word_embeddings" if model.tie_word_embeddings else None
    if shared is None and model.embedding_size:
        shared = "embedding_size"
    if shared is not None and not model.final_norm:
        raise ConfigError(
            f"model.initialization.kind=mup with model.{shared} scales the logits by the final "
            "norm, and there is none: set model.final_norm=true"
        )
