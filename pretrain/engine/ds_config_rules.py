"""Rules about several keys of a ds_config at once, and DeepSpeed's own check of the whole."""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.config import DeepSpeedConfig
from pydantic import ValidationError

from pretrain.config.recipe import Recipe
from pretrain.core.errors import ConfigError
from pretrain.core.files import JsonObject


def check_combination(ds_config: JsonObject, origin: str, recipe: Recipe) -> None:
    """Refuse what DeepSpeed would not do at this stage, or with this recipe.

    Args:
        ds_config: whose keys were checked one by one.
        origin: of the ds_config, for error sentences.

    Raises:
        ConfigError: with the reason.
    """


def check_with_deepspeed(resolved: JsonObject, origin: str, world_size: int) -> None:
    """Let DeepSpeed read a resolved ds_config, as it will when the training starts.

    Raises:
        ConfigError: with DeepSpeed's reason, if it refuses it.
    """
    # The ranks are not connected yet: DeepSpeed takes itself for the only one.
    alone = resolved | {"train_batch_size": resolved["train_batch_size"] // world_size}
    try:
        DeepSpeedConfig(alone)
    # Each section of DeepSpeed raises its own kind of error.
    except Exception as error:
        raise ConfigError(f"{origin}: DeepSpeed refuses it: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        details: list[Any] = list(error.errors())
        return "; ".join(
            f"{'.'.join(str(part) for part in detail['loc'])} {detail['msg']}".strip()
            for detail in details
        )
    return " ".join(str(error).split()) or type(error).__name__
