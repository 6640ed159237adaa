"""Does the exported model compute the same numbers? Logits against logits, over real text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil
import torch
from torch import Tensor
from tqdm import tqdm

from pretrain.core.errors import CheckpointError, DataError
from pretrain.export.hf_open import open_model
from pretrain.export.name_map import Link, Tensors, Zeros
from pretrain.model.config import ModelConfig
from pretrain.model.decoder import DecoderLM

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from data_pipeline.shards.token_stream import TokenStream

WINDOWS = 8
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Parity:
    """The result of a comparison of logits.

    ``max_difference`` is the largest absolute difference; ``logits_std`` is the standard deviation
    of the logits, to judge it by.
    """

    windows: int
    max_difference: float
    logits_std: float


def parity_windows(stream: TokenStream, sequence_length: int, count: int = WINDOWS) -> Tensor:
    """Up to ``count`` full windows [W, S] int64, spread evenly over the stream.

    Raises:
        DataError: if the stream is shorter than one window.
    """
    full = stream.num_tokens // sequence_length
    if full == 0:
        raise DataError(
            f"the text to compare on has {stream.num_tokens} tokens, comparing logits needs"
            f" {sequence_length}: give longer data"
        )
    chosen = np.unique(np.linspace(0, full - 1, min(count, full)).round().astype(np.int64))
    return torch.from_numpy(
        np.stack([stream.read(int(index) * sequence_length, sequence_length) for index in chosen])
    )


def load_exported(folder: Path) -> PreTrainedModel:
    """The exported model in fp32 on the CPU.

    Raises:
        CheckpointError: if transformers cannot open it, or misses a tensor, has one too many or
            one of another shape.
    """
    try:
        return open_model(folder, torch.float32)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; nothing was published") from None


@torch.inference_mode()
def compare_logits(model: DecoderLM, exported: PreTrainedModel, windows_WS: Tensor) -> Parity:
    """Runs both models over each window, one window at a time, and compares their logits."""
    model.eval()
    largest = torch.zeros(())
    total = 0.0
    squares = 0.0
    numbers = 0
    for window_S in tqdm(windows_WS, desc="comparing logits", unit="window"):
        ours_SV = model.logits(window_S[None])[0]
        theirs_SV = exported(input_ids=window_S[None], use_cache=False).logits[0]
        if ours_SV.shape != theirs_SV.shape:
            raise CheckpointError(
                f"the export gives logits {list(theirs_SV.shape)}, the checkpoint"
                f" {list(ours_SV.shape)}: nothing was published"
            )
        # torch.maximum keeps a NaN, Python's max may lose it.
        largest = torch.maximum(largest, (ours_SV - theirs_SV).abs().max())
        total += float(ours_SV.double().sum())
        # fp64: the variance is a difference of two large sums.
        squares += float(ours_SV.double().square().sum())
        numbers += ours_SV.numel()
    mean = total / numbers
    return Parity(len(windows_WS), float(largest), max(squares / numbers - mean**2, 0.0) ** 0.5)


def check_parity(parity: Parity, tolerance: float = TOLERANCE) -> None:
    """Raises :class:`CheckpointError` unless the largest difference is within ``tolerance``."""
    if not parity.max_difference <= tolerance:
        raise CheckpointError(
            f"the export's logits differ from the checkpoint's by up to {parity.max_difference:.2e}"
            f" over {parity.windows} windows (allowed: {tolerance:.0e}; the logits' standard"
            f" deviation is {parity.logits_std:.2e}): nothing was published"
        )


def check_same_numbers(links: Iterable[Link | Zeros], ours: Tensors, theirs: Tensors) -> None:
    """Compares each written tensor with its source, bit for bit.

    A few windows of logits do not show an error in an expert that no token was routed to.

    Raises:
        CheckpointError: for the first tensor that is not the same.
    """
    for link in tqdm(links, desc="reading back", unit="tensor"):
        found = theirs.read(link.theirs) if isinstance(link, Zeros) else link.of_theirs(theirs)
        expected = (
            torch.zeros_like(found)
            if isinstance(link, Zeros)
            else link.of_ours(ours).to(found.dtype)
        )
        if not same_bits(expected, found):
            raise CheckpointError(
                f"the tensor '{link.theirs}' does not read back as it was written: nothing was"
                " published; check the disk, then try again"
            )


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are equal bit for bit, NaN included."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    # Compared as bytes: NaN differs from itself, and -0.0 equals 0.0. view() needs contiguous data.
    return torch.equal(
        first.contiguous().reshape(-1).view(torch.uint8),
        second.contiguous().reshape(-1).view(torch.uint8),
    )


def free_memory() -> int:
    """Bytes that this process may still take, by the machine and by its control group."""
    free = psutil.virtual_memory().available
    limit = Path("/sys/fs/cgroup/memory.max")
    used = Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()).isdigit():
        free = min(free, int(text) - int(used.read_text()))
    return free


@torch.no_grad()
def reference_model(model: ModelConfig, ours: Tensors, dtype: torch.dtype) -> DecoderLM:
    """This project's model in fp32, with weights rounded to ``dtype``."""
    # Kernels do not change the function, and those of the training may need a package or a device
    # that is missing here.
    built = DecoderLM(model.portable())
    parameters = dict(built.named_parameters())
    buffers = dict(built.named_buffers())
    for name in ours.names:
        tensor = ours.read(name)
        if name in parameters:
            parameters[name].copy_(tensor.to(dtype))
        else:
            buffers[name].copy_(tensor)
    return built.eval()
