"""An export target: with a sharpness of 1 the router is Qwen3-MoE's."""

from typing import Any, ClassVar

from pretrain.export.architectures.qwen3_moe import Qwen3Moe
from pretrain.export.features import Takes
from pretrain.model.config import ModelConfig


class SharpQwen3Moe(Qwen3Moe):
    """The target ``sharp_qwen3_moe``, which transformers opens as ``qwen3_moe``."""

    name = "sharp_qwen3_moe"
    order = 200
    takes: ClassVar[Takes] = {
        **Qwen3Moe.takes,
        "moe.router.kind": ("sharp_topk",),
        "moe.router.sharpness": (1.0,),
    }

    def config(self, model: ModelConfig, eod_id: int) -> dict[str, Any]:
        """Return the fields of ``config.json``."""
        return super().config(model, eod_id) | {"model_type": Qwen3Moe.name}
