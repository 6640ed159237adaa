"""How long a run will take: from its speed so far, or from the peak of a GPU."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from pretrain.callbacks.metrics import METRICS, read_records
from pretrain.config.recipe import Recipe
from pretrain.core.accelerators import (
    ACCELERATORS,
    Accelerator,
    accelerator,
    accelerator_of_device,
)
from pretrain.core.errors import ConfigError
from pretrain.engine.precision import resolve_precision
from pretrain.model.attention.kernels.base import (
    check_kernel_here,
    gpu_capability,
    gpu_demand,
)
from pretrain.model.attention.kernels.config import kernel_section
from pretrain.model.moe.config import MoE
from pretrain.model.moe.exchange.base import check_parts, check_parts_here

# Mixtures of experts lose more to communication and small matrix products than dense models, which
# reach 0.4 to 0.5 on large clusters.
ASSUMED_MFU = 0.35
ESTIMATE_OPTIONS = (
    "for an estimate of the time give --gpu NAME "
    f"({', '.join(known.name for known in ACCELERATORS)}) and, if you know it, --mfu"
)


@dataclass(frozen=True)
class Hardware:
    """What the estimate of the time assumes.

    Attributes:
        gpu: of every rank; None is the one of this machine.
        mfu: model FLOPs utilization (Chowdhery et al. 2022): FLOP/s of the model / peak of the
            GPUs.
    """

    gpu: Accelerator | None = None
    mfu: float = ASSUMED_MFU

    def choose_precision(self, wanted: str) -> str:
        """Return the number format of the run; on a named GPU "auto" is bf16, as it is there.

        Raises:
            ConfigError: if the GPU, or without one this machine, cannot compute in that format.
        """
        if self.gpu is None:
            return resolve_precision(wanted)
        if wanted == "fp8" and not self.gpu.has_fp8:
            raise ConfigError(f"train.precision=fp8: {self.gpu.name} has no fp8 matrix products")
        return "bf16" if wanted == "auto" else wanted

    @property
    def device(self) -> tuple[str, tuple[int, int] | None]:
        """Its type as torch names it, and the compute capability of a GPU of NVIDIA."""
        if self.gpu is not None:
            return "cuda", self.gpu.capability
        capability = gpu_capability()
        return "cpu" if capability is None else "cuda", capability

    def check_kernel(self, name: str) -> None:
        """Check that an attention kernel that is for certain GPUs runs on this one.

        Raises:
            ConfigError: if it does not.
        """
        if self.gpu is None:
            check_kernel_here(name)
        elif needed := gpu_demand(kernel_section(name), self.gpu.capability):
            raise ConfigError(
                f"model.attention.kernel={name} needs {needed}, and {self.gpu.name} has another: "
                "use --set model.attention.kernel=sdpa"
            )

    def check_experts(self, moe: MoE | None, ep_size: int, precision: str) -> None:
        """Check that what moves and multiplies experts' rows runs on this GPU.

        Raises:
            ConfigError: if it does not.
        """
        if self.gpu is None:
            check_parts_here(moe, ep_size, precision)
        else:
            check_parts(moe, ep_size, precision, self.gpu.capability, may_lack_packages=True)


@dataclass(frozen=True)
class Estimate:
    """Time of the steps ahead: ``seconds`` is None if nothing is known of the speed."""

    seconds: float | None
    basis: str


def add_estimate_options(parser: argparse.ArgumentParser) -> None:
    """Add --gpu and --mfu, which :func:`hardware_of` reads."""
    names = ", ".join(known.name for known in ACCELERATORS)
    parser.add_argument(
        "--gpu",
        metavar="NAME",
        help=f"with --dry-run: estimate the time on this GPU: {names}",
    )
    parser.add_argument(
        "--mfu",
        type=float,
        default=ASSUMED_MFU,
        metavar="SHARE",
        help=(
            "with --dry-run: the share of the GPUs' peak FLOP/s that training reaches "
            f"(default: {ASSUMED_MFU})"
        ),
    )


def hardware_of(options: argparse.Namespace) -> Hardware:
    """Return the hardware that the options name.

    Raises:
        ConfigError: if the GPU is not in the table, or --mfu is no share.
    """
    if not 0 < options.mfu <= 1:
        raise ConfigError(f"--mfu {options.mfu:g} is no share of the peak: give 0.35 for example")
    return Hardware(None if options.gpu is None else accelerator(options.gpu), options.mfu)


def estimate_time(
    recipe: Recipe, hardware: Hardware, *, world_size: int, tokens: int, flops_per_token: float
) -> Estimate:
    """Estimate the time of ``tokens`` on ``world_size`` ranks.

    Args:
        recipe: resolved.
        flops_per_token: of the model, the mean over these tokens.
    """
    # A run that has begun is measured, unless the question is about another GPU.
    rates = [
        record["tokens_per_second"]
        for record in read_records(Path(recipe.output_path) / METRICS)
        if record["kind"] == "train"
    ]
    if rates and hardware.gpu is None:
        # The median: validation, evaluation or another job may have slowed some records down.
        median = sorted(rates)[len(rates) // 2]
        return Estimate(tokens / median, "from the speed of this run so far")
    gpu = hardware.gpu or _gpu_of_this_machine()
    if gpu is None:
        return Estimate(None, f"no GPU here that has a known peak: {ESTIMATE_OPTIONS}")
    precision = recipe.train.precision
    if precision == "fp32" and recipe.train.tf32:
        return Estimate(None, "no estimate: TF32 peaks are not in the table of GPUs")
    peak = gpu.peak_flops(precision)
    seconds = tokens * flops_per_token / (peak * hardware.mfu * world_size)
    # By convention the MFU of fp8 is of the bf16 peak.
    peak_format = "bf16" if precision == "fp8" else precision
    basis = (
        f"assuming an MFU of {hardware.mfu:g} on {world_size} x {gpu.name}, "
        f"peak {peak / 1e12:,.0f} TFLOP/s in {peak_format}"
    )
    return Estimate(seconds, basis)


def _gpu_of_this_machine() -> Accelerator | None:
    if not torch.cuda.is_available():
        return None
    return accelerator_of_device(torch.cuda.get_device_name())


def duration(seconds: float) -> str:
    """Return a time in the unit that a reader would use."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    if seconds < 172800:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:,.1f} days"
