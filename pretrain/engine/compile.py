"""``torch.compile`` of what gains by it: attention with norm and residual, and whole dense blocks.

Routing is not compiled: the number of rows per expert differs in every step, and a compiled graph
would break there.
"""

from __future__ import annotations

import torch

from pretrain.model.block import Block
from pretrain.model.decoder import DecoderLM


def compile_blocks(model: DecoderLM, backend: str = "inductor") -> None:
    """Compile in place; the compilation itself happens in the first step.

    Parameters keep their names, and modules of one shape share a graph.

    Args:
        backend: one of ``torch.compiler.list_backends()``; ``aot_eager`` traces without generating
            code.
    """
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
