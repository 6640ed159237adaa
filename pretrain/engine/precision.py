"""Which number format a run computes in, and whether the hardware can."""

from __future__ import annotations

import torch
from deepspeed.accelerator import get_accelerator

from pretrain.config.errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(asked: str) -> str:
    """``fp32``, ``bf16`` or ``fp16`` for this device.

    Raises:
        ConfigError: where the device cannot compute in what the recipe asks for.
    """
    accelerator = get_accelerator()
    name = accelerator.device_name()
    if asked == "auto":
        return "bf16" if _native_bf16(name) else "fp32"
    if asked == "bf16" and not accelerator.is_bf16_supported():
        raise ConfigError(f"train.precision is bf16, but this {name} device cannot compute in it: use --set train.precision=fp32")
    if asked == "fp16" and not accelerator.is_fp16_supported():
        raise ConfigError(f"train.precision is fp16, but this {name} device cannot compute in it: use --set train.precision=bf16 or fp32")
    return asked


def _native_bf16(device_name: str) -> bool:
    """Whether bf16 products are fast, not emulated."""
    if device_name == "cuda":
        return torch.cuda.get_device_capability()[0] >= 8
    if device_name == "cpu":
        if not hasattr(torch.cpu, "get_capabilities"):  # older than torch 2.12
            return bool(torch.cpu._is_avx512_bf16_supported())
        return any(torch.cpu.get_capabilities().get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))
    return bool(get_accelerator().is_bf16_supported())
