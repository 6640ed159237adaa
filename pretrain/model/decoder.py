"""The whole model: embedding, blocks, final norm, head; its training loss and its cached logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pretrain.config.model_schema import ModelConfig
from pretrain.model.attention.mask import AttentionMask
from pretrain.model.block import Block
from pretrain.model.embedding import TokenEmbedding
from pretrain.model.loss import LanguageModelHead
from pretrain.model.moe.balance import loss_weights
from pretrain.model.moe.interface import RouterStatistics, RoutingRecord


class RouterTotals(NamedTuple):
    """The statistics of all MoE layers, stacked: ``losses_LJ`` [L, J], ``counts_LE`` [L, E], the others [L]; fp32, without gradient."""

    losses_LJ: torch.Tensor
    counts_LE: torch.Tensor
    entropy_L: torch.Tensor
    dropped_L: torch.Tensor


class TrainOutput(NamedTuple):
    """Attributes:
    loss: [] what is minimised: (summed cross-entropy + output z-loss) / normalizer + weighted router losses.
    nll: [] plain negative log-likelihood summed over the counted tokens, nats, without gradient.
    router: statistics of the MoE layers, None for a dense model.
    """

    loss: torch.Tensor
    nll: torch.Tensor
    router: RouterTotals | None


class KVCache:
    """What attention keeps of every layer for generation, each in its own form; ``length`` tokens are filled."""

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers
        self.length = 0


class DecoderLM(nn.Module):
    """A decoder-only language model from a :class:`ModelConfig`.

    Args:
        config: with ``vocab_size`` set.
        ep_size: ranks that share one set of experts; at 1 no process group is needed.
        ep_rank: which part of the experts this rank holds.
        activation_checkpointing: recompute each block in the backward pass.
    """

    def __init__(self, config: ModelConfig, ep_size: int = 1, ep_rank: int = 0, activation_checkpointing: bool = False) -> None:
        super().__init__()
        assert config.vocab_size is not None, "resolve the vocabulary size before building the model"
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        self.embedding = TokenEmbedding(config)
        self.position = config.position.implementing_class()(config)
        self.layers = nn.ModuleList(Block(config, layer, ep_size, ep_rank) for layer in range(config.num_hidden_layers))
        norm = config.norm.implementing_class()
        self.final_norm = norm(config.hidden_size, config.norm.eps) if config.final_norm else nn.Identity()
        sizes = self.embedding.size, config.padded_vocab_size, config.vocab_size
        self.head = LanguageModelHead(*sizes, config.loss_chunk_tokens, config.output_z_loss_weight, config.head_bias)
        if config.tie_word_embeddings:
            self.head.weight = self.embedding.weight

    def forward(
        self,
        input_ids_BS: torch.Tensor,
        labels_BS: torch.Tensor,
        normalizer: torch.Tensor | float,
        document_ids_BS: torch.Tensor | None = None,
        fractions_LE: torch.Tensor | None = None,
        position_ids_BS: torch.Tensor | None = None,
    ) -> TrainOutput:
        """One micro batch's loss.

        Args:
            input_ids_BS: int64 token ids.
            labels_BS: int64 next tokens, -100 where no loss is taken.
            normalizer: counted tokens a micro batch, averaged over the global batch: the summed cross-entropy is divided by it.
            document_ids_BS: attention stays inside equal ids.
            fractions_LE: choices per token of each layer's experts over the global batch, for the load-balance loss.
            position_ids_BS: each token's place in its document; its place in the sequence by default.
        """
        x_BSD, statistics = self._hidden(input_ids_BS, AttentionMask(document_ids_BS=document_ids_BS), None, fractions_LE, position_ids_BS)
        loss, nll = self.head(self.embedding.reduce(x_BSD), labels_BS)
        loss = loss / normalizer
        if not statistics:
            return TrainOutput(loss, nll, None)
        assert self.config.moe is not None
        stacked = RouterTotals(*(torch.stack(values) for values in zip(*statistics, strict=True)))
        for weight, values_L in zip(loss_weights(self.config.moe).values(), stacked.losses_LJ.unbind(1), strict=True):
            if weight:
                loss = loss + weight * values_L.sum()
        return TrainOutput(loss, nll, RouterTotals(*(values.detach() for values in stacked)))

    def logits(
        self,
        input_ids_BS: torch.Tensor,
        document_ids_BS: torch.Tensor | None = None,
        cache: KVCache | None = None,
        position_ids_BS: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits [B, S, vocab_size] in fp32; with a cache, of the S tokens that follow what it holds, which are added to it."""
        offset = 0 if cache is None else cache.length
        x_BSD, _ = self._hidden(input_ids_BS, AttentionMask(offset, document_ids_BS), cache, None, position_ids_BS)
        if cache is not None:
            cache.length += input_ids_BS.shape[1]
        return self.head(self.embedding.reduce(x_BSD))

    def new_cache(self, batch_size: int, max_tokens: int, device: torch.device | str, dtype: torch.dtype) -> KVCache:
        """An empty cache for ``max_tokens`` tokens, prompt included."""
        return KVCache([block.attention.new_cache(batch_size, max_tokens, device, dtype) for block in self.layers])

    def _hidden(
        self,
        input_ids_BS: torch.Tensor,
        mask: AttentionMask,
        cache: KVCache | None,
        fractions_LE: torch.Tensor | None,
        position_ids_BS: torch.Tensor | None,
    ) -> tuple[torch.Tensor, list[RouterStatistics]]:
        positions = position_ids_BS
        if positions is None:
            positions = torch.arange(mask.offset, mask.offset + input_ids_BS.shape[1], device=input_ids_BS.device)
        x_BSD = self.position.add(self.embedding(input_ids_BS), positions)
        terms = self.position.terms(positions)
        statistics: list[RouterStatistics] = []
        for index, block in enumerate(self.layers):
            fractions_E = fractions_LE[len(statistics)] if fractions_LE is not None and block.is_moe else None
            layer_cache = None if cache is None else cache.layers[index]
            if self.activation_checkpointing and torch.is_grad_enabled():
                x_BSD, layer_statistics = checkpoint(block, x_BSD, terms, mask, None, RoutingRecord(), fractions_E, use_reentrant=False)
            else:
                x_BSD, layer_statistics = block(x_BSD, terms, mask, layer_cache, None, fractions_E)
            if layer_statistics is not None:
                statistics.append(layer_statistics)
        return self.final_norm(x_BSD), statistics
