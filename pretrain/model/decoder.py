"""The whole model: embedding, blocks, final norm and head, with its loss and its cached logits."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from pretrain.core.errors import ConfigError
from pretrain.model.attention.kernels.config import kernel_section
from pretrain.model.attention.mask import AttentionMask
from pretrain.model.block import Block
from pretrain.model.config import ModelConfig, Recomputation
from pretrain.model.embedding import TokenEmbedding
from pretrain.model.loss import LanguageModelHead
from pretrain.model.moe.base import MoELayer, RouterStatistics, RoutingRecord
from pretrain.model.moe.losses import loss_weights
from pretrain.model.multi_token import MultiTokenBlock, shifted_by_one
from pretrain.model.positions.interface import PositionTerms
from pretrain.model.recomputation import contexts
from pretrain.model.token_parallel import SequenceParallel, TensorParallel, TokenParts


class RouterTotals(NamedTuple):
    """The statistics of all MoE layers, stacked; fp32, without gradient.

    ``losses_LJ`` is [L, J] and ``counts_LE`` is [L, E]; the others are [L]. In training the block
    of multi-token prediction counts as one more layer, the last one, if it is a mixture of experts.
    """

    losses_LJ: torch.Tensor
    counts_LE: torch.Tensor
    entropy_L: torch.Tensor
    dropped_L: torch.Tensor


class TrainOutput(NamedTuple):
    """What a forward pass in training returns.

    Attributes:
        loss: [] what is minimised: (summed cross-entropy + output z-loss) / normalizer + weighted
            router losses. Multi-token prediction adds its own summed cross-entropy and z-loss,
            times its weight and by the same normalizer (DeepSeek-V3, eq. 24 and 25).
        nll: [] plain negative log-likelihood in nats, summed over the counted next tokens, without
            gradient.
        router: statistics of the MoE layers, None for a dense model.
        multi_token_nll: [] as ``nll``, of the tokens after the next; None without multi-token
            prediction, and outside training.
    """

    loss: torch.Tensor
    nll: torch.Tensor
    router: RouterTotals | None
    multi_token_nll: torch.Tensor | None = None


class KVCache:
    """The caches of all attention layers for generation; each kind of attention has its own form.

    ``length`` tokens are filled. Setting ``length`` back drops the tokens after it: nothing reads
    them, and the next ones overwrite them.
    """

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers
        self.length = 0


class _Place(NamedTuple):
    """Where the tokens of one call are in their sequences.

    Attributes:
        positions: [S] or [B, S] int64.
        terms: what attention needs of the positions, computed once for all layers.
        mask: which keys each token may see.
    """

    positions: torch.Tensor
    terms: PositionTerms
    mask: AttentionMask


def _check_roles(model: DecoderLM) -> None:
    """Refuse a kind of MoE layer that does not say what one of its tensors is for.

    Such a tensor would be counted, trained and initialised as one of a dense feed-forward.
    """
    moe = model.config.moe
    for prefix, module in model.named_modules():
        if moe is None or not (isinstance(module, Block) and module.is_moe):
            continue
        for name, _ in module.feed_forward.named_parameters():
            if moe.role_of(name) is None:
                raise ConfigError(
                    f"{type(moe).__name__}.role_of('{name}') is None, but {prefix}.feed_forward of"
                    f" kind '{moe.kind}' has that parameter: add the start of its name with its"
                    " role to the section's tensor_roles"
                )


class DecoderLM(nn.Module):
    """A decoder-only language model from a :class:`ModelConfig`.

    Args:
        config: with ``vocab_size`` set.
        ep_size: ranks that share one set of experts; at 1 no process group is needed.
        ep_rank: which part of the experts this rank holds.
        activation_checkpointing: what of each block is recomputed in the backward pass.
    """

    def __init__(
        self,
        config: ModelConfig,
        ep_size: int = 1,
        ep_rank: int = 0,
        activation_checkpointing: Recomputation = "none",
    ) -> None:
        super().__init__()
        assert config.vocab_size is not None, (
            "resolve the vocabulary size before building the model"
        )
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        self.embedding = TokenEmbedding(config)
        self.position = config.position.implementing_class()(config)
        self.layers = nn.ModuleList(
            Block(config, layer, ep_size, ep_rank) for layer in range(config.num_hidden_layers)
        )
        self.multi_token = (
            MultiTokenBlock(config, ep_size, ep_rank) if config.multi_token_prediction else None
        )
        norm = config.norm.implementing_class()
        self.final_norm = (
            norm(config.hidden_size, config.norm.eps) if config.final_norm else nn.Identity()
        )
        self.head = LanguageModelHead(
            self.embedding.size,
            padded_vocab_size=config.padded_vocab_size,
            vocab_size=config.vocab_size,
            chunk_tokens=config.loss_chunk_tokens,
            z_loss_weight=config.output_z_loss_weight,
            has_bias=config.head_bias,
        )
        # One Parameter object under two names: named_parameters() reports it once.
        if config.tie_word_embeddings:
            self.head.weight = self.embedding.weight
        # Set by what compiles blocks.
        self.compiled = False
        self._parts: TokenParts | None = None
        self._sequence: SequenceParallel | None = None
        self._tensor: TensorParallel | None = None
        _check_roles(self)

    def share(
        self,
        parts: TokenParts,
        sequence: SequenceParallel | None,
        tensor: TensorParallel | None,
    ) -> None:
        """Let :meth:`forward` compute this rank's part of sequences that several ranks get.

        Args:
            parts: all ranks that get them; neighbours among them share tensors.
            sequence: the ranks that compute heads in parts, over whole sequences.
            tensor: the ranks that share tensors: this one keeps its part of them. To be given once.
        """
        self._parts, self._sequence, self._tensor = parts, sequence, tensor
        for module in self.modules():
            if isinstance(module, MoELayer):
                module.token_parts = parts
        if tensor is not None:
            self.embedding.share(tensor)
            tied = self.embedding.weight if self.config.tie_word_embeddings else None
            self.head.share(tensor, tied)
            for module in self.modules():
                if isinstance(module, Block):
                    module.share(tensor)

    def own_tokens(self, x_BS: torch.Tensor) -> torch.Tensor:
        """The tokens [B, S] that :meth:`forward` computes here, of all that it is given."""
        return x_BS if self._parts is None else self._parts.own(x_BS)

    def forward(
        self,
        input_ids_BS: torch.Tensor,
        labels_BS: torch.Tensor,
        normalizer: torch.Tensor | float,
        document_ids_BS: torch.Tensor | None = None,
        fractions_LE: torch.Tensor | None = None,
        position_ids_BS: torch.Tensor | None = None,
        max_documents: int | None = None,
    ) -> TrainOutput:
        """The loss of one micro batch; of this rank's tokens if ranks share its sequences.

        Args:
            input_ids_BS: int64 token ids.
            labels_BS: int64 next tokens, already shifted by the loader; -100 takes no loss.
            normalizer: counted tokens per micro batch, averaged over the global batch; the summed
                cross-entropy is divided by it.
            document_ids_BS: attention stays inside equal ids.
            fractions_LE: choices per token of each layer's experts over the global batch, for the
                load-balance loss.
            position_ids_BS: each token's position in its document; in the sequence by default.
            max_documents: as :class:`AttentionMask` has it.
        """
        mask = AttentionMask(0, document_ids_BS, max_documents, self._sequence)
        packs = kernel_section(self.config.attention.kernel).packs_documents
        if self.compiled and packs and document_ids_BS is not None:
            mask.pack_before_compiled_code(input_ids_BS.shape[1])
        multi_token = self.multi_token if self.training else None
        # Before the cut: the last token of a rank's part is followed by the first of the next.
        shifted = None if multi_token is None else shifted_by_one(input_ids_BS, labels_BS)
        place = self._place(input_ids_BS, mask, position_ids_BS)
        input_ids_BS, labels_BS = self.own_tokens(input_ids_BS), self.own_tokens(labels_BS)
        x_BSD, statistics = self._trunk(input_ids_BS, place, None, fractions_LE)
        loss, nll = self.head(self._normed(x_BSD), labels_BS)
        multi_token_nll: torch.Tensor | None = None
        # Multi-token prediction reads the hidden states before the final norm: both heads norm
        # their own.
        if multi_token is not None and shifted is not None:
            next_ids_BS, labels_after_BS = map(self.own_tokens, shifted)
            fractions_E = (
                # The block of multi-token prediction is the last routed layer.
                fractions_LE[-1] if fractions_LE is not None and multi_token.block.is_moe else None
            )
            x_BSD, block_statistics = self._run(
                multi_token, (x_BSD, self.embedding(next_ids_BS)), place, None, fractions_E
            )
            statistics += [] if block_statistics is None else [block_statistics]
            multi_token_loss, multi_token_nll = self.head(self._normed(x_BSD), labels_after_BS)
            loss = loss + multi_token.loss_weight * multi_token_loss
        # Only the summed losses are divided: router losses are means over the micro batch already.
        loss = loss / normalizer
        if not statistics:
            return TrainOutput(loss, nll, None, multi_token_nll)
        assert self.config.routing is not None
        # A list of layers' statistics -> each statistic stacked over the layers.
        stacked = RouterTotals(*(torch.stack(values) for values in zip(*statistics, strict=True)))
        for weight, values_L in zip(
            loss_weights(self.config.routing).values(), stacked.losses_LJ.unbind(1), strict=True
        ):
            # A weight of 0 must not enter the sum: 0 * inf would make the loss NaN.
            if weight:
                loss = loss + weight * values_L.sum()
        # Detached: kept statistics would keep the graph of the whole step in memory.
        return TrainOutput(
            loss, nll, RouterTotals(*(values.detach() for values in stacked)), multi_token_nll
        )

    def _place(
        self, input_ids_BS: torch.Tensor, mask: AttentionMask, position_ids_BS: torch.Tensor | None
    ) -> _Place:
        positions = position_ids_BS
        if positions is None:
            # The tokens in the cache come first, so positions continue after them.
            positions = torch.arange(
                mask.offset, mask.offset + input_ids_BS.shape[1], device=input_ids_BS.device
            )
        # Attention has the tokens of all ranks that share tensors, everything else its own.
        in_attention = positions if mask.sequence is None else mask.sequence.own(positions, dim=-1)
        terms = self.position.terms(in_attention)
        if self._tensor is not None and terms.slopes_N is not None:
            terms = terms._replace(slopes_N=self._tensor.own(terms.slopes_N, dim=0))
        if self._parts is not None:
            positions = self._parts.own(positions, dim=-1)
        return _Place(positions, terms, mask)

    def _trunk(
        self,
        input_ids_BS: torch.Tensor,
        place: _Place,
        cache: KVCache | None,
        fractions_LE: torch.Tensor | None,
    ) -> tuple[torch.Tensor, list[RouterStatistics]]:
        x_BSD = self.position.add(self.embedding(input_ids_BS), place.positions)
        x_BSD = functional.dropout(x_BSD, self.config.dropout.embedding, self.training)
        statistics: list[RouterStatistics] = []
        for index, block in enumerate(self.layers):
            fractions_E = (
                # Row l of the fractions belongs to the l-th routed layer, not to block l: dense
                # blocks have none.
                fractions_LE[len(statistics)] if fractions_LE is not None and block.is_moe else None
            )
            x_BSD, layer_statistics = self._run(
                block, (x_BSD,), place, None if cache is None else cache.layers[index], fractions_E
            )
            if layer_statistics is not None:
                statistics.append(layer_statistics)
        return x_BSD, statistics

    def _run(
        self,
        block: nn.Module,
        inputs: tuple[torch.Tensor, ...],
        place: _Place,
        layer_cache: Any,
        fractions_E: torch.Tensor | None,
    ) -> tuple[torch.Tensor, RouterStatistics | None]:
        """Run one block, recomputed in the backward pass if activations are checkpointed."""
        if self.activation_checkpointing != "none" and torch.is_grad_enabled():
            # The record makes the recomputation repeat the first pass' choice of experts: a top-k
            # that flips on a rounding error would change the shapes that autograd has saved.
            recomputed = checkpoint(
                block,
                *inputs,
                place.terms,
                place.mask,
                None,
                RoutingRecord(keeps_rows=self.activation_checkpointing == "selective"),
                fractions_E,
                # The re-entrant form would not see the record's fresh choice, and loses the
                # statistics' gradient.
                use_reentrant=False,
                context_fn=contexts(self.activation_checkpointing),
            )
            return recomputed[0], recomputed[1]
        x_BSD, statistics = block(*inputs, place.terms, place.mask, layer_cache, None, fractions_E)
        return x_BSD, statistics

    def _normed(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, S, D] as the head multiplies them: normed, reduced if factorised."""
        return self.embedding.reduce(self.final_norm(x_BSD))

    def logits(
        self,
        input_ids_BS: torch.Tensor,
        document_ids_BS: torch.Tensor | None = None,
        cache: KVCache | None = None,
        position_ids_BS: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits [B, S, vocab_size] in fp32.

        With a cache, the S tokens follow those it holds and are added to it.
        """
        return self.project(self.hidden(input_ids_BS, document_ids_BS, cache, position_ids_BS))

    def hidden(
        self,
        input_ids_BS: torch.Tensor,
        document_ids_BS: torch.Tensor | None = None,
        cache: KVCache | None = None,
        position_ids_BS: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The output of the last block, before the final norm: [B, S, D].

        With a cache, as :meth:`logits`; the document ids are then [B, cache.length + S], those of
        the cached tokens included.
        """
        offset = 0 if cache is None else cache.length
        place = self._place(input_ids_BS, AttentionMask(offset, document_ids_BS), position_ids_BS)
        x_BSD, _ = self._trunk(input_ids_BS, place, cache, None)
        # Only after the last layer: every layer writes its keys at the old length.
        if cache is not None:
            cache.length += input_ids_BS.shape[1]
        return x_BSD

    def project(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """Logits [B, S, vocab_size] in fp32 from hidden states [B, S, D].

        ``x_BSD`` is what :meth:`hidden` or the block of multi-token prediction returns.
        """
        logits_BSV: torch.Tensor = self.head(self._normed(x_BSD))
        return logits_BSV

    def draft_logits(
        self, x_BSD: torch.Tensor, next_ids_BS: torch.Tensor, cache: KVCache
    ) -> torch.Tensor:
        """Logits [B, S, vocab_size] of the tokens after the next, by multi-token prediction.

        Args:
            x_BSD: :meth:`hidden` of the S tokens that follow those in ``cache``; they are added to
                it.
            next_ids_BS: int64, the token that follows each of them.
            cache: from :meth:`new_draft_cache`.
        """
        assert self.multi_token is not None
        place = self._place(next_ids_BS, AttentionMask(cache.length), None)
        x_BSD, _ = self._run(
            self.multi_token, (x_BSD, self.embedding(next_ids_BS)), place, cache.layers[0], None
        )
        cache.length += next_ids_BS.shape[1]
        return self.project(x_BSD)

    def new_cache(
        self, batch_size: int, max_tokens: int, device: torch.device | str, dtype: torch.dtype
    ) -> KVCache:
        """An empty cache for ``max_tokens`` tokens, prompt included."""
        return KVCache(
            [
                cast(Block, block).attention.new_cache(batch_size, max_tokens, device, dtype)
                for block in self.layers
            ]
        )

    def new_draft_cache(
        self, batch_size: int, max_tokens: int, device: torch.device | str, dtype: torch.dtype
    ) -> KVCache:
        """An empty cache for the block of multi-token prediction alone."""
        assert self.multi_token is not None
        return KVCache(
            [self.multi_token.block.attention.new_cache(batch_size, max_tokens, device, dtype)]
        )
