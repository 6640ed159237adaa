"""Peak throughput and memory of GPUs, from their vendors' data sheets."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from pretrain.core.errors import ConfigError


@dataclass(frozen=True)
class Accelerator:
    """One GPU.

    Attributes:
        name: as a user gives it.
        key: word of the device name that torch reports; None if that does not identify it.
        bf16_flops: dense peak of bf16 and fp16 with sums in fp32, FLOP/s, without sparsity. Vendors
            often print twice as much, for sparse matrices.
        fp32_flops: peak of fp32 without TF32, which torch does not use unless asked.
        memory_bytes: of one GPU.
        source: the data sheet.
        capability: compute capability; None if it is no NVIDIA GPU.
        has_fp8: whether torch multiplies matrices in fp8 on it (compute capability 8.9 or later).
    """

    name: str
    key: str | None
    bf16_flops: float
    fp32_flops: float
    memory_bytes: float
    source: str
    capability: tuple[int, int] | None = None
    has_fp8: bool = True

    def peak_flops(self, precision: str) -> float:
        """FLOP/s for a recipe's precision; by convention the MFU of fp8 uses the bf16 peak."""
        return self.fp32_flops if precision == "fp32" else self.bf16_flops


# Compute capability of the oldest GPUs that Triton, and with it torch.compile, generates code for.
TRITON_CAPABILITY = (7, 0)
# Words of device names: slower cards of the same chip, parts of one (multi-instance GPU).
OTHER_VARIANTS = {"PCIe", "PCIE", "NVL", "Laptop", "MIG"}
ACCELERATORS = (
    Accelerator(
        "A100",
        "A100",
        312e12,
        19.5e12,
        80e9,
        "NVIDIA A100 data sheet, SXM 80 GB",
        (8, 0),
        has_fp8=False,
    ),
    Accelerator(
        "A100-40GB",
        None,
        312e12,
        19.5e12,
        40e9,
        "NVIDIA A100 data sheet, 40 GB",
        (8, 0),
        has_fp8=False,
    ),
    Accelerator(
        "A800",
        "A800",
        312e12,
        19.5e12,
        80e9,
        "NVIDIA A800 data sheet, 80 GB",
        (8, 0),
        has_fp8=False,
    ),
    Accelerator("H100", "H100", 989e12, 67e12, 80e9, "NVIDIA H100 data sheet, SXM", (9, 0)),
    Accelerator("H800", "H800", 989e12, 67e12, 80e9, "NVIDIA H800 data sheet, SXM", (9, 0)),
    Accelerator("H200", "H200", 989e12, 67e12, 141e9, "NVIDIA H200 data sheet, SXM", (9, 0)),
    Accelerator(
        "B200", "B200", 2250e12, 75e12, 180e9, "NVIDIA HGX B200 data sheet, an eighth", (10, 0)
    ),
    Accelerator("L40S", "L40S", 362e12, 91.6e12, 48e9, "NVIDIA L40S data sheet", (8, 9)),
    Accelerator("L4", "L4", 121e12, 30.3e12, 24e9, "NVIDIA L4 data sheet", (8, 9)),
    Accelerator(
        "RTX 4090", "4090", 165e12, 82.6e12, 24e9, "NVIDIA Ada architecture whitepaper", (8, 9)
    ),
    Accelerator(
        "RTX 5090",
        "5090",
        209.5e12,
        104.8e12,
        32e9,
        "NVIDIA RTX Blackwell GPU architecture whitepaper",
        (12, 0),
    ),
    # fp16 alone: it has no bf16.
    Accelerator("T4", "T4", 65e12, 8.1e12, 16e9, "NVIDIA T4 data sheet", (7, 5), has_fp8=False),
    Accelerator("MI300X", "MI300X", 1307e12, 163e12, 192e9, "AMD Instinct MI300X data sheet"),
)


def accelerator(name: str) -> Accelerator:
    """The GPU with this name; case, blanks, hyphens and underscores do not matter.

    Raises:
        ConfigError: if the name is not in the table.
    """
    names = {_plain(known.name): known for known in ACCELERATORS}
    if (found := names.get(_plain(name))) is not None:
        return found
    near = difflib.get_close_matches(_plain(name), names, n=1)
    hint = f" Did you mean {names[near[0]].name}?" if near else ""
    raise ConfigError(
        f"--gpu: '{name}' is not known.{hint} "
        f"Known are {', '.join(known.name for known in ACCELERATORS)}"
    )


def accelerator_of_device(device_name: str) -> Accelerator | None:
    """The GPU that torch calls ``device_name``, None if it is not in the table.

    Names are compared by whole words (an L40 is no L4). Cut-down or shared variants of a GPU have
    other peaks and count as unknown.
    """
    words = set(re.split(r"[\s\-_/]+", device_name))
    # An unknown peak gives no MFU, which is better than a wrong one.
    if words & OTHER_VARIANTS:
        return None
    return next((known for known in ACCELERATORS if known.key in words), None)


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
