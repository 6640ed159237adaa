"""What kernels of the FlashAttention family share: their form of documents, windows and tensors."""

from __future__ import annotations

import torch

from pretrain.core.errors import ConfigError
from pretrain.model.attention.scores import Scores


def rows_of(x_BNSH: torch.Tensor) -> torch.Tensor:
    """[B, N, S, H] -> [B * S, N, H]: all sequences behind each other."""
    return x_BNSH.transpose(1, 2).flatten(0, 1)


def window_before(scores: Scores) -> tuple[int, int]:
    """The keys before and after a query that it sees, without itself; -1 for all."""
    return (-1, 0) if scores.window is None else (scores.window - 1, 0)


def check_place(kernel: str, q_BNSH: torch.Tensor) -> None:
    """Check that the kernel of this name gets fp16 or bf16 on CUDA.

    Raises:
        ConfigError: if it does not.
    """
    half = q_BNSH.dtype in (torch.float16, torch.bfloat16)
    if q_BNSH.device.type != "cuda" or not half:
        raise ConfigError(
            f"model.attention.kernel={kernel} takes fp16 or bf16 on CUDA, not {q_BNSH.dtype} on "
            f"{q_BNSH.device.type}: use --set model.attention.kernel=sdpa"
        )
