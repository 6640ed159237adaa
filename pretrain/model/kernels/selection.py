"""Whether fused kernels compute, or the plain code that they are tested against.

A setting of the process, as torch has for the precision of its products.
"""

from __future__ import annotations

import importlib.util
from typing import Literal, get_args

import torch

from pretrain.core.errors import ConfigError

# ``always``: by Triton's interpreter on CPUs too, far slower than the plain code; for tests.
Mode = Literal["auto", "none", "always"]
# The dtypes whose values the kernels' fp32 registers hold exactly.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Found, not imported: an import takes long, and processes without CUDA need none.
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_mode: Mode = "auto"


def set_fused_kernels(mode: Mode) -> None:
    """Choose the kernels of this process.

    Args:
        mode: ``auto``, which is also the state without a call: on CUDA, if Triton is installed;
            ``none``: nowhere; ``always``: on CPUs too, by Triton's interpreter.

    Raises:
        ConfigError: for another mode, or ``always`` where Triton cannot interpret.
    """
    global _mode
    if mode not in get_args(Mode):
        raise ConfigError(f"fused kernels have no mode {mode!r}: use {', '.join(get_args(Mode))}")
    if mode == "always" and not _interprets():
        raise ConfigError(
            "fused kernels compute on CPUs in Triton's interpreter only: set TRITON_INTERPRET=1 "
            "before the first import of triton, or use the mode auto"
        )
    _mode = mode


def use_fused(x: torch.Tensor) -> bool:
    """Whether a fused kernel computes with tensors like ``x``: of its device and dtype."""
    if _mode == "none" or not _HAS_TRITON or x.dtype not in DTYPES:
        return False
    return x.is_cuda or _mode == "always"


def _interprets() -> bool:
    if not _HAS_TRITON:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)
