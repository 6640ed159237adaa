"""``torch.compile`` of what can be one graph: attention with norm and residual, and dense blocks.

Routing is not compiled: the number of rows per expert differs in every step, and a compiled graph
would break there. Of experts and head, what is between their matrix products can be.
"""

from __future__ import annotations

import torch

from pretrain.core.accelerators import TRITON_CAPABILITY
from pretrain.model.block import Block
from pretrain.model.decoder import DecoderLM
from pretrain.model.loss import LanguageModelHead
from pretrain.model.moe.experts import Experts
from pretrain.model.moe.shared_experts import SharedExperts


def chosen_form(
    asked: str, device_type: str, capability: tuple[int, int] | None, zero_stage: int
) -> str:
    """What ``train.compile`` is on this device: ``none``, ``blocks`` or ``all``.

    ``auto`` compiles where code is generated fast and runs faster. ZeRO 3 gathers weights inside
    what would be compiled.

    Args:
        capability: compute capability of the GPU; None without one.
    """
    if asked != "auto":
        return asked
    able = device_type == "cuda" and capability is not None and capability >= TRITON_CAPABILITY
    return "blocks" if able and zero_stage < 3 else "none"


def compile_model(model: DecoderLM, form: str) -> None:
    """Compile what ``form`` of :func:`chosen_form` says, in place."""
    if form != "none":
        compile_blocks(model)
    if form == "all":
        compile_experts_and_head(model)


def compile_blocks(model: DecoderLM, backend: str = "inductor") -> None:
    """Compile in place; the compilation itself happens in the first step.

    Parameters keep their names, and modules of one shape share a graph.

    Args:
        backend: one of ``torch.compiler.list_backends()``; ``aot_eager`` traces without generating
            code.
    """
    model.compiled = True
    # dynamic=False: shapes are fixed in training, and a symbolic graph is slower.
    for block in (module for module in model.modules() if isinstance(module, Block)):
        if block.is_moe:
            # The bound method is replaced on the instance, so the module and its hooks stay
            # untouched.
            attend = torch.compile(block.attend, backend=backend, dynamic=False)
            block.attend = attend  # type: ignore[method-assign]
        else:
            # ``nn.Module.compile`` keeps the module; ``torch.compile(block)`` would wrap it and
            # rename parameters.
            block.compile(backend=backend, dynamic=False)


def compile_experts_and_head(model: DecoderLM, backend: str = "inductor") -> None:
    """Compile the activation of dropless experts, shared experts, and the head's loss, in place.

    Their matrix products stay as they are: experts' numbers of rows change from step to step, so
    their activation is one graph for any number; the loss has one for a chunk of tokens, and one
    for a shorter last chunk.
    """
    for module in model.modules():
        if isinstance(module, Experts):
            activate = torch.compile(module.form.kind.activate, backend=backend, dynamic=True)
            module.form = module.form._replace(compiled=activate)
        elif isinstance(module, SharedExperts):
            module.compile(backend=backend, dynamic=False)
        elif isinstance(module, LanguageModelHead) and not module.is_shared:
            module.chunk_losses = torch.compile(module.chunk_losses, backend=backend, dynamic=False)
