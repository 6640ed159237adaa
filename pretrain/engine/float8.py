"""Linear layers that multiply in fp8: torchao's ``Float8Linear``, with one scale per tensor.

Weights stay bf16 with fp32 masters, and keep their names. Converted are the projections inside the
blocks whose sizes fp8 products take: attention, dense feed-forwards, shared experts, and the
experts of DeepSpeed's own layer. Embeddings, head, routers, norms, and the stacked experts of
dropless layers compute in bf16.
"""

from __future__ import annotations

import torch
from torch import nn

from pretrain.core.errors import ConfigError

# torch._scaled_mm takes only matrices whose sides are multiples of it.
MULTIPLE = 16


def takes_fp8(module: nn.Module, name: str) -> bool:
    """Whether the linear layer ``name`` of a model is converted."""
    projection = name.endswith(("_proj", ".projection"))
    return (
        projection
        and isinstance(module, nn.Linear)
        and module.in_features % MULTIPLE == 0
        and module.out_features % MULTIPLE == 0
    )


def convert_linears(model: nn.Module, device: torch.device) -> None:
    """Convert in place; the parameters stay the same objects.

    Without CUDA the rounding is emulated: the right values, no gain in speed.

    Raises:
        ConfigError: if torchao is not installed, or no layer has the sizes.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise ConfigError(
            f"train.precision is fp8, which needs the package torchao ({error}): "
            "install it, or use train.precision=bf16"
        ) from None
    # A run without a single fp8 product would be a bf16 run under a wrong name.
    if not any(takes_fp8(module, name) for name, module in model.named_modules()):
        raise ConfigError(
            "train.precision is fp8, but no projection of this model has sides that are multiples "
            f"of {MULTIPLE}: use train.precision=bf16"
        )
    # Rows are tokens, and an expert gets any number of them: pad_inner_dim pads them to a multiple
    # of 16 in the product for the weight's gradient.
    config = Float8LinearConfig(pad_inner_dim=True, emulate=device.type != "cuda")
    convert_to_float8_training(model, module_filter_fn=takes_fp8, config=config)
