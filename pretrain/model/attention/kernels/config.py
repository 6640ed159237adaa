"""What each attention kernel can compute, without importing it; a new kernel is a section here.

``model.attention.kernel`` names one by its ``kind`` alone: kernels have no fields.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from pretrain.core.registry import Component, kinds_by_name

# Elements that a head grows by if sinks are the score of one more key: fused kernels on CUDA take
# heads whose size is a multiple of 8.
SINK_WIDTH = 8


@dataclass(frozen=True)
class KernelDemands:
    """What a recipe needs of a kernel beyond plain causal attention in half precision.

    Attributes:
        widest_head: elements of the widest head, in training or with a cache.
        trained_head: elements of the widest head without a cache.
        latents: elements that latent attention caches of a token, and those of the latent alone;
            None for other attention, and for one that never attends to its latents.
    """

    sliding_window: bool
    sinks: bool
    alibi: bool
    dropout: bool
    document_mask: bool
    fp32: bool
    values_of_another_width: bool
    widest_head: int
    trained_head: int
    latents: tuple[int, int] | None = None


class Kernel(Component):
    """A way to compute softmax(q k^T) v; ``implementation`` is an ``AttentionKernel``.

    Attributes:
        package: what has to be installed in addition to torch, or a module of newer ones.
        max_head_dim: elements of the widest head it takes; None for any.
        latents: the only latent attention that it is for, as in :class:`KernelDemands`; None for a
            kernel of any attention.
        capability: compute capability of the only GPUs that it runs on; None for any device.
        least_capability: that of the oldest GPUs that it runs on; None for any device.
        cache_multiple: tokens that the size of a cache is rounded up to.
        packs_documents: whether it takes documents as ``AttentionMask.packed`` has them.

    The other attributes are the demands of the same name. All default to false: a kernel has to
    state what it can compute.
    """

    package: ClassVar[str | None] = None
    max_head_dim: ClassVar[int | None] = None
    latents: ClassVar[tuple[int, int] | None] = None
    capability: ClassVar[tuple[int, int] | None] = None
    least_capability: ClassVar[tuple[int, int] | None] = None
    cache_multiple: ClassVar[int] = 1
    packs_documents: ClassVar[bool] = False
    sliding_window: ClassVar[bool] = False
    sinks: ClassVar[bool] = False
    alibi: ClassVar[bool] = False
    dropout: ClassVar[bool] = False
    document_mask: ClassVar[bool] = False
    fp32: ClassVar[bool] = False
    values_of_another_width: ClassVar[bool] = False

    @classmethod
    def lacks(cls, demands: KernelDemands) -> list[str]:
        """The demands that it cannot meet, by name in alphabetical order."""
        asked = {name for name, value in vars(demands).items() if value is True}
        missing = {name for name in asked if not getattr(cls, name)}
        if cls.max_head_dim is not None and demands.widest_head > cls.max_head_dim:
            missing.add(f"heads_wider_than_{cls.max_head_dim}")
        if cls.latents is not None and demands.latents != cls.latents:
            with_key, alone = cls.latents
            missing.add(f"anything_but_latents_of_{alone}_elements_and_{with_key}_with_their_key")
        return sorted(missing)


class Reference(Kernel):
    """The definition, in fp32: what tests compare the others with."""

    implementation: ClassVar[str] = "pretrain.model.attention.kernels.reference:reference_attention"
    sliding_window: ClassVar[bool] = True
    sinks: ClassVar[bool] = True
    alibi: ClassVar[bool] = True
    dropout: ClassVar[bool] = True
    document_mask: ClassVar[bool] = True
    fp32: ClassVar[bool] = True
    values_of_another_width: ClassVar[bool] = True
    kind: Literal["reference"]


# It computes everything, which is why ``auto`` falls back on it: masks become explicit if need be.
class Sdpa(Kernel):
    """torch's fused scaled_dot_product_attention."""

    implementation: ClassVar[str] = "pretrain.model.attention.kernels.sdpa:sdpa_attention"
    sliding_window: ClassVar[bool] = True
    sinks: ClassVar[bool] = True
    alibi: ClassVar[bool] = True
    dropout: ClassVar[bool] = True
    document_mask: ClassVar[bool] = True
    fp32: ClassVar[bool] = True
    values_of_another_width: ClassVar[bool] = True
    kind: Literal["sdpa"]


class Flex(Kernel):
    """torch's flex_attention (Dong et al. 2024); on a CPU it has no backward pass."""

    implementation: ClassVar[str] = "pretrain.model.attention.kernels.flex:flex_attention"
    sliding_window: ClassVar[bool] = True
    sinks: ClassVar[bool] = True
    alibi: ClassVar[bool] = True
    document_mask: ClassVar[bool] = True
    fp32: ClassVar[bool] = True
    values_of_another_width: ClassVar[bool] = True
    kind: Literal["flex"]


# No fp32 or values of another width: flash_attn has no arguments for them.
class Flash(Kernel):
    """The package flash_attn (Dao 2023, FlashAttention-2), in fp16 or bf16."""

    implementation: ClassVar[str] = "pretrain.model.attention.kernels.flash:flash_attention"
    sliding_window: ClassVar[bool] = True
    sinks: ClassVar[bool] = True
    alibi: ClassVar[bool] = True
    dropout: ClassVar[bool] = True
    document_mask: ClassVar[bool] = True
    package: ClassVar[str | None] = "flash_attn"
    max_head_dim: ClassVar[int] = 256
    least_capability: ClassVar[tuple[int, int] | None] = (8, 0)
    packs_documents: ClassVar[bool] = True
    kind: Literal["flash"]

    @classmethod
    def lacks(cls, demands: KernelDemands) -> list[str]:
        """Sinks are the score of one more key and widen each head: what that rules out is added."""
        missing = super().lacks(demands)
        if demands.sinks:
            with_window = ["sinks_with_a_window"] if demands.sliding_window else []
            with_alibi = ["sinks_with_alibi"] if demands.alibi else []
            # Each document would need a key of its own for them.
            with_documents = ["sinks_with_document_masks"] if demands.document_mask else []
            widest = cls.max_head_dim - SINK_WIDTH
            wide = [f"heads_wider_than_{widest}_with_sinks"]
            missing += with_window + with_alibi + with_documents
            missing += wide if demands.widest_head > widest else []
        return sorted(missing)


# Training and prompts are sdpa's, which computes everything; what decodes must be FlashMLA's own.
class FlashMLA(Kernel):
    """Latent attention that decodes by the package flash_mla (DeepSeek 2025); sdpa trains it."""

    implementation: ClassVar[str] = "pretrain.model.attention.kernels.flash_mla:flash_mla_attention"
    dropout: ClassVar[bool] = True
    document_mask: ClassVar[bool] = True
    values_of_another_width: ClassVar[bool] = True
    package: ClassVar[str | None] = "flash_mla"
    latents: ClassVar[tuple[int, int]] = (576, 512)
    capability: ClassVar[tuple[int, int] | None] = (9, 0)
    cache_multiple: ClassVar[int] = 64
    kind: Literal["flash_mla"]


# No ALiBi, dropout or sinks: torch's function has no arguments for them, and its logsumexp, from
# which sinks could follow, passes no gradient on.
class Varlen(Kernel):
    """torch's varlen_attn: FlashAttention over packed documents, in fp16 or bf16.

    Without documents, and with a cache, it is sdpa's.
    """

    implementation: ClassVar[str] = "pretrain.model.attention.kernels.varlen:varlen_attention"
    sliding_window: ClassVar[bool] = True
    document_mask: ClassVar[bool] = True
    values_of_another_width: ClassVar[bool] = True
    package: ClassVar[str | None] = "torch.nn.attention.varlen"
    max_head_dim: ClassVar[int] = 256
    least_capability: ClassVar[tuple[int, int] | None] = (8, 0)
    packs_documents: ClassVar[bool] = True
    kind: Literal["varlen"]

    @classmethod
    def lacks(cls, demands: KernelDemands) -> list[str]:
        """Heads of a cache may be wider: sdpa computes them."""
        return super().lacks(replace(demands, widest_head=demands.trained_head))


# A run chooses one of the others; a model that is built alone, such as for evaluation, has sdpa.
class Auto(Kernel):
    """The fastest of the others for the device and the recipe; ``sdpa`` on a CPU."""

    implementation: ClassVar[str] = "pretrain.model.attention.kernels.sdpa:sdpa_attention"
    sliding_window: ClassVar[bool] = True
    sinks: ClassVar[bool] = True
    alibi: ClassVar[bool] = True
    dropout: ClassVar[bool] = True
    document_mask: ClassVar[bool] = True
    fp32: ClassVar[bool] = True
    values_of_another_width: ClassVar[bool] = True
    kind: Literal["auto"]


def kernel_section(name: str) -> type[Kernel]:
    """The section of the kernel that a recipe calls ``name``."""
    return kinds_by_name(Kernel)[name]
