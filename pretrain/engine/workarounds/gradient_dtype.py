"""Gradients that are summed in another format than that of the weights.

Fact: at stage 1 DeepSpeed takes another optimizer for bf16 weights whose gradients are summed in
    fp32, one that averages the norms of ranks with different experts; at stage 0 it has none for
    them.
Versions: 0.19.8
Upstream: none known
Effect: steps would lack the gradient norm that clipping and guards look at.
Test: tests/unit/config/test_ds_config_resolution.py shows the refusal; none shows that DeepSpeed
    has changed
"""

from __future__ import annotations

from pretrain.core.errors import ConfigError
from pretrain.core.files import JsonObject

# DeepSpeed's names of the formats -> ours.
GRADIENT_DTYPES = {
    "float32": "fp32",
    "float": "fp32",
    "fp32": "fp32",
    "bfloat16": "bf16",
    "bf16": "bf16",
    "float16": "fp16",
    "half": "fp16",
    "fp16": "fp16",
}


def check_gradient_dtype(
    ds_config: JsonObject, origin: str, precision: str, zero_stage: int
) -> None:
    """Refuse a ``data_types.grad_accum_dtype`` that DeepSpeed cannot combine with the stage.

    Args:
        origin: of the ds_config, for error sentences.

    Raises:
        ConfigError: if it is not a known format, or cannot be combined.
    """
    in_file = ds_config.get("data_types", {}).get("grad_accum_dtype")
    if in_file is None:
        return
    dtype = GRADIENT_DTYPES.get(str(in_file).removeprefix("torch."))
    if dtype is None:
        raise ConfigError(
            f"{origin}: data_types.grad_accum_dtype is {in_file!r}; use fp32, bf16 or fp16"
        )
    model = "bf16" if precision == "fp8" else precision
    offload = ds_config.get("zero_optimization", {}).get("offload_optimizer") or {}
    # The combination in which DeepSpeed replaces its stage 1 optimizer by its BF16_Optimizer.
    other_optimizer = zero_stage == 1 and model == "bf16" and offload.get("device") != "cpu"
    if dtype != model and (zero_stage == 0 or other_optimizer):
        raise ConfigError(
            f"{origin}: data_types.grad_accum_dtype is {in_file!r}, which DeepSpeed cannot do for "
            f"{model} weights at ZeRO stage {zero_stage}: "
            "use ds_configs/zero2.json or zero3.json with it"
        )
