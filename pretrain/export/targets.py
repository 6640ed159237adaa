"""The architectures that a checkpoint can be exported to, and which of them can compute what a recipe describes."""

from __future__ import annotations

from typing import Any, Protocol

from pretrain.config.recipe import Recipe
from pretrain.core.errors import ConfigError
from pretrain.export.architectures.deepseek_v2 import DeepseekV2
from pretrain.export.architectures.deepseek_v3 import DeepseekV3
from pretrain.export.architectures.glm4_moe import Glm4Moe
from pretrain.export.architectures.gpt_oss import GptOss
from pretrain.export.architectures.llama import Llama
from pretrain.export.architectures.llama_like import LlamaLike
from pretrain.export.architectures.mistral import Mistral
from pretrain.export.architectures.mixtral import Mixtral
from pretrain.export.architectures.olmoe import Olmoe
from pretrain.export.architectures.qwen2 import Qwen2
from pretrain.export.architectures.qwen2_moe import Qwen2Moe
from pretrain.export.architectures.qwen3 import Qwen3
from pretrain.export.architectures.qwen3_moe import Qwen3Moe
from pretrain.export.custom.target import Custom
from pretrain.export.name_map import Links
from pretrain.model.config import ModelConfig

AUTO = "auto"


class ExportTarget(Protocol):
    """A class that transformers opens. A new one is a file with such a class, and a line in ``TARGETS``.

    Attributes:
        name: what ``--target`` calls it; transformers' ``model_type``.
        architecture: transformers' class.
        keeps_factors: it takes a factorised embedding as it is, and not multiplied out.
        files: paths of what is copied beside ``config.json``, such as the code of a class that transformers does not have.
    """

    @property
    def name(self) -> str: ...

    @property
    def architecture(self) -> str: ...

    @property
    def keeps_factors(self) -> bool: ...

    @property
    def files(self) -> tuple[str, ...]: ...

    def reasons_against(self, model: ModelConfig) -> list[str]:
        """Why the architecture cannot compute what ``model`` computes, a clause each; empty when it can."""

    def links(self, model: ModelConfig) -> Links:
        """A link for each tensor of the export; only asked where nothing speaks against it."""

    def config(self, model: ModelConfig, eod_id: int) -> dict[str, Any]:
        """The architecture's own fields of ``config.json``."""


# Also opened by --from hf. Those that most programs read come first: auto takes the first one that fits.
ARCHITECTURES: tuple[LlamaLike, ...] = (
    *(Llama(), Mistral(), Qwen3(), Qwen2()),
    *(Mixtral(), Qwen3Moe(), Qwen2Moe(), Olmoe(), DeepseekV3(), DeepseekV2(), Glm4Moe(), GptOss()),
)
# The last one is a class of our own, which travels with the weights.
TARGETS: tuple[ExportTarget, ...] = (*ARCHITECTURES, Custom())


def target_names() -> list[str]:
    return [target.name for target in TARGETS]


def representable(recipe: Recipe) -> dict[str, list[str]]:
    """Why each target cannot compute what the recipe's model computes, a clause each; an empty list when it can."""
    return {target.name: target.reasons_against(recipe.model) for target in TARGETS}


def choose_target(recipe: Recipe, name: str = AUTO) -> ExportTarget:
    """The target of that name, or the first one, that computes exactly what the recipe's model computes.

    Raises:
        ConfigError: with every reason, when there is none.
    """
    reasons = representable(recipe)
    asked = [target for target in TARGETS if name in (AUTO, target.name)]
    if not asked:
        raise ConfigError(
            f"there is no target '{name}': choose {AUTO} or one of {', '.join(target_names())}"
        )
    for target in asked:
        if not reasons[target.name]:
            return target
    listed = "".join(f"\n  {target.name}: {'; '.join(reasons[target.name])}" for target in asked)
    what = (
        "no exact counterpart in transformers"
        if name == AUTO
        else f"no exact counterpart in {name}"
    )
    raise ConfigError(
        f"the model of '{recipe.name}' has {what}; convert it with --to safetensors, or train one that has. Against it speaks:{listed}"
    )
