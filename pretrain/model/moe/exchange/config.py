"""What moves tokens to their experts, and what multiplies them there, without importing either.

``model.moe.exchange`` and ``model.moe.expert_kernel`` name one by its ``kind`` alone: they have no
fields.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pretrain.core.registry import Component, kinds_by_name


class DroplessPart(Component):
    """A part of the dropless layer that some package may compute on some devices.

    Attributes:
        field: of the recipe that names it.
        default: the kind that runs anywhere.
        package: what has to be installed in addition to torch and DeepSpeed.
        capability: lowest compute capability of the GPUs that it runs on; None for any device.
        precisions: values of ``train.precision`` that it computes in; empty for any.
    """

    field: ClassVar[str]
    default: ClassVar[str]
    package: ClassVar[str | None] = None
    capability: ClassVar[tuple[int, int] | None] = None
    precisions: ClassVar[tuple[str, ...]] = ()


class Exchange(DroplessPart):
    """A way to move tokens between ranks; ``implementation`` is a ``Journey``.

    Attributes:
        forms_expert_outputs: whether a token's rank gets the output of each of its experts, for
            their dropout, if each choice travels by itself.
    """

    field: ClassVar[str] = "model.moe.exchange"
    default: ClassVar[str] = "all_to_all"
    forms_expert_outputs: ClassVar[bool] = False


class AllToAll(Exchange):
    """torch's all-to-all, on every device, overlapped with the shared experts."""

    implementation: ClassVar[str] = "pretrain.model.moe.exchange.all_to_all:journey"
    forms_expert_outputs: ClassVar[bool] = True
    kind: Literal["all_to_all"]


class DeepEP(Exchange):
    """The package deep_ep (DeepSeek 2025, version 2), through DeepSpeed's own use of it."""

    implementation: ClassVar[str] = "pretrain.model.moe.exchange.deepep:DeepEPJourney"
    package: ClassVar[str | None] = "deep_ep"
    capability: ClassVar[tuple[int, int] | None] = (9, 0)
    precisions: ClassVar[tuple[str, ...]] = ("bf16",)
    kind: Literal["deepep"]


class ExpertKernel(DroplessPart):
    """A way to multiply rows by their experts' matrices; an ``experts.ExpertFunction``."""

    field: ClassVar[str] = "model.moe.expert_kernel"
    default: ClassVar[str] = "auto"


class Auto(ExpertKernel):
    """grouped_mm for bf16, and on CPUs in training for fp32 too; else the loop."""

    implementation: ClassVar[str] = "pretrain.model.moe.experts:experts_auto"
    kind: Literal["auto"]


class Loop(ExpertKernel):
    """One expert after the other: the reference."""

    implementation: ClassVar[str] = "pretrain.model.moe.experts:experts_loop"
    kind: Literal["loop"]


class GroupedMM(ExpertKernel):
    """torch's grouped matrix product."""

    implementation: ClassVar[str] = "pretrain.model.moe.experts:experts_grouped_mm"
    kind: Literal["grouped_mm"]


# 8.0: its kernels are CUTLASS's for bf16, which came with that architecture.
class GroupedGemm(ExpertKernel):
    """The package grouped_gemm (MegaBlocks, Gale et al. 2022), in bf16."""

    implementation: ClassVar[str] = "pretrain.model.moe.grouped_gemm:experts_grouped_gemm"
    package: ClassVar[str | None] = "grouped_gemm"
    capability: ClassVar[tuple[int, int] | None] = (8, 0)
    precisions: ClassVar[tuple[str, ...]] = ("bf16",)
    kind: Literal["grouped_gemm"]


def exchange_section(name: str) -> type[Exchange]:
    """The section of the exchange that a recipe calls ``name``."""
    return kinds_by_name(Exchange)[name]


def expert_kernel_section(name: str) -> type[ExpertKernel]:
    """The section of the expert kernel that a recipe calls ``name``."""
    return kinds_by_name(ExpertKernel)[name]
