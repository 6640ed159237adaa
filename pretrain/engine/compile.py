"""``torch.compile`` of what gains by it: attention with its norm and residual, dense blocks whole.

What routes tokens stays as it is: how many rows an expert gets differs in every step, and a
compiled graph would break there.
"""

from __future__ import annotations

import torch

from pretrain.model.block import Block
from pretrain.model.decoder import DecoderLM


def compile_blocks(model: DecoderLM, backend: str = "inductor") -> None:
    """Compile in place, at the first step.

    Parameters keep their names, and modules of one shape share a graph.

    Args:
        backend: one of ``torch.compiler.list_backends()``; ``aot_eager`` traces without generating
            code.
    """
    for block in (module for module in model.modules() if isinstance(module, Block)):
        if block.is_moe:
            attend = torch.compile(block.attend, backend=backend, dynamic=False)
            block.attend = attend  # type: ignore[method-assign]
        else:
            block.compile(backend=backend, dynamic=False)
