"""Multi-token prediction of depth 1 (DeepSeek-V3, arXiv 2412.19437, section 2.2, eq. 21 to 25).

One more block predicts the token after the next: for its loss in training, and as a draft model in
generation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from pretrain.model.attention.mask import AttentionMask
from pretrain.model.block import Block
from pretrain.model.config import ModelConfig
from pretrain.model.loss import IGNORED_LABEL
from pretrain.model.moe.base import RouterStatistics, RoutingRecord
from pretrain.model.positions.interface import PositionTerms


class MultiTokenBlock(nn.Module):
    """h'_i = block(M [norm(h_i); norm(Emb(t_{i+1}))]), of the same kind as the model's last block.

    h_i is the output of the model's last block, before the final norm. Embedding, final norm and
    head are shared with the model; an absolute position is in h_i already and is not added again.
    ``loss_weight`` is lambda of eq. 25.
    """

    def __init__(self, config: ModelConfig, ep_size: int, ep_rank: int) -> None:
        super().__init__()
        assert config.multi_token_prediction is not None
        self.loss_weight = config.multi_token_prediction.loss_weight
        size = config.hidden_size
        norm = config.norm.implementing_class()
        self.hidden_norm = norm(size, config.norm.eps)
        self.embedding_norm = norm(size, config.norm.eps)
        self.projection = nn.Linear(2 * size, size, bias=False)
        # The last layer's index: window and MoE pattern are those of the last block.
        self.block = Block(config, config.num_hidden_layers - 1, ep_size, ep_rank)

    def forward(
        self,
        x_BSD: torch.Tensor,
        embedded_BSD: torch.Tensor,
        positions: PositionTerms,
        mask: AttentionMask,
        cache: Any = None,
        record: RoutingRecord | None = None,
        fractions_E: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, RouterStatistics | None]:
        """As :meth:`Block.forward`, for hidden states and the embeddings of the tokens that follow.

        Args:
            embedded_BSD: embeddings of the tokens that follow those of ``x_BSD``.
            positions: of the tokens of ``x_BSD``, as ``mask``.
        """
        joined_BSX = torch.cat((self.hidden_norm(x_BSD), self.embedding_norm(embedded_BSD)), dim=-1)
        y_BSD, statistics = self.block(
            self.projection(joined_BSX), positions, mask, cache, record, fractions_E
        )
        return y_BSD, statistics


def shifted_by_one(
    input_ids_BS: torch.Tensor, labels_BS: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The next token of each input, and the token after it as a label; both int64 [B, S].

    A label is -100 if the next token or the one after it has no label (it belongs to another
    document, or is padding), and at the end of a sequence, because the token after the next is
    beyond it. The next token of the last input is its label, or the input itself if it has no
    label.
    """
    last_B1 = torch.where(
        labels_BS[:, -1:] == IGNORED_LABEL, input_ids_BS[:, -1:], labels_BS[:, -1:]
    )
    # labels_BS is shifted by one already, so labels_BS[:, 1:] is two tokens after the input.
    after_BS = labels_BS[:, 1:].masked_fill(labels_BS[:, :-1] == IGNORED_LABEL, IGNORED_LABEL)
    return torch.cat((input_ids_BS[:, 1:], last_B1), dim=1), functional.pad(
        after_BS, (0, 1), value=IGNORED_LABEL
    )
