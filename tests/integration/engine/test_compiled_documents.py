"""Compiled blocks over packed documents: other numbers of documents need no other graphs."""

from __future__ import annotations

import pytest
import torch

from pretrain.engine.compile import compile_blocks
from pretrain.model.attention.kernels.reference import reference_attention
from pretrain.model.attention.scores import Scores
from tests.support.tiny_model import random_tokens, tiny_model

B, S = 2, 32


def packing_attention(
    q_BNSH: torch.Tensor, k_BMUH: torch.Tensor, v_BMUV: torch.Tensor, scores: Scores
) -> torch.Tensor:
    """What varlen and flash read of a mask; the rest is the reference's."""
    packed = scores.mask.packed(q_BNSH.shape[2])
    y_BNSV = reference_attention(q_BNSH, k_BMUH, v_BMUV, scores)
    return y_BNSV + 0 * packed.queries_C.sum() + 0 * packed.keys_C.sum()


def test_numbers_of_documents_share_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = 0

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        nonlocal graphs
        graphs += 1
        return graph

    model = tiny_model().train()
    for block in model.layers:
        monkeypatch.setattr(block.attention, "kernel", packing_attention)
    # As on a GPU, where the choice of a kernel for documents is one that packs them.
    model.config = model.config.model_copy(
        update={"attention": model.config.attention.model_copy(update={"kernel": "varlen"})}
    )
    compile_blocks(model, backend)  # type: ignore[arg-type]
    counted = []
    for documents in (2, 4, 8, 16, 32, 64):
        tokens = random_tokens(B, S + 1, seed=documents)
        ids_BS = (torch.arange(S) * documents // (B * S)).expand(B, S).contiguous()
        model(
            tokens[:, :-1], tokens[:, 1:], float(B * S), ids_BS, max_documents=documents
        ).loss.backward()
        counted.append(graphs)
    assert counted[0] > 0 and len(set(counted[1:])) == 1, counted
