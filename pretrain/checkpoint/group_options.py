"""The options of an optimizer's parameter groups, which DeepSpeed's loading overwrites.

A checkpoint brings its weight decay, betas and learning rates along; those of the recipe must hold.
"""

from __future__ import annotations

from pretrain.core.files import JsonObject


def group_options(groups: list[JsonObject]) -> list[JsonObject]:
    """Return the options of an optimizer's parameter groups, such as weight decay and betas."""
    return [{key: value for key, value in group.items() if key != "params"} for group in groups]


def restore_group_options(groups: list[JsonObject], options: list[JsonObject]) -> None:
    """Set what :func:`group_options` returned, after a checkpoint has overwritten it."""
    for group, values in zip(groups, options, strict=True):
        group.update(values)
