"""The number format of a run, and whether the hardware supports it."""

from __future__ import annotations

import torch
from deepspeed.accelerator import get_accelerator

from pretrain.config.recipe import Recipe
from pretrain.core.errors import ConfigError

# The dtype of weights and activations; in fp8 only the products of linear layers are narrower.
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.bfloat16,
}


def resolve_precision(asked: str) -> str:
    """The precision for this device: ``fp32``, ``bf16``, ``fp16`` or ``fp8``.

    Raises:
        ConfigError: if the device cannot compute in the requested one.
    """
    accelerator = get_accelerator()
    name = accelerator.device_name()
    # Emulated bf16 is slower than fp32 and less exact: only native support counts here.
    if asked == "auto":
        return "bf16" if _native_bf16(name) else "fp32"
    if asked == "bf16" and not accelerator.is_bf16_supported():
        raise ConfigError(
            f"train.precision is bf16, but this {name} device cannot compute in it: "
            "use --set train.precision=fp32"
        )
    if asked == "fp16" and not accelerator.is_fp16_supported():
        raise ConfigError(
            f"train.precision is fp16, but this {name} device cannot compute in it: "
            "use --set train.precision=bf16 or fp32"
        )
    if asked == "fp8" and (reason := _no_fp8(name)):
        raise ConfigError(
            "train.precision is fp8, which needs a GPU of compute capability 8.9 or more, "
            f"but {reason}: use --set train.precision=bf16"
        )
    return asked


def hardware_warnings(recipe: Recipe) -> list[str]:
    """Sentences for what a recipe asks for and this device does not have."""
    if recipe.train.tf32 and not _has_tf32():
        return [
            "train.tf32 has no effect here: "
            "only GPUs of compute capability 8.0 or more multiply in TF32"
        ]
    return []


def set_matmul_precision(tf32: bool) -> None:
    """Compute fp32 products in TF32 (NVIDIA 2020) if the recipe asks and the hardware has it.

    Otherwise they are computed in fp32.
    """
    torch.set_float32_matmul_precision("high" if tf32 and _has_tf32() else "highest")


def _has_tf32() -> bool:
    return get_accelerator().device_name() == "cuda" and torch.cuda.get_device_capability()[0] >= 8


def _no_fp8(device_name: str) -> str:
    """Why this device has no fp8 products; empty if it has."""
    if device_name != "cuda":
        return f"this device is a {device_name}"
    major, minor = torch.cuda.get_device_capability()
    return "" if (major, minor) >= (8, 9) else f"this one has {major}.{minor}"


def _native_bf16(device_name: str) -> bool:
    """Whether bf16 products are fast, not emulated."""
    if device_name == "cuda":
        return torch.cuda.get_device_capability()[0] >= 8
    if device_name == "cpu":
        # Older than torch 2.12.
        if not hasattr(torch.cpu, "get_capabilities"):
            return bool(torch.cpu._is_avx512_bf16_supported())
        return any(
            torch.cpu.get_capabilities().get(name, False)
            for name in ("amx_bf16", "avx512_bf16", "bf16")
        )
    return bool(get_accelerator().is_bf16_supported())
