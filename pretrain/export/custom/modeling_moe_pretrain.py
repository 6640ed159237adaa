"""The decoder: embedding, blocks of attention and feed-forward, final norm, head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .attention_moe_pretrain import ATTENTION, NORMS, Places, places
from .configuration_moe_pretrain import MoePretrainConfig
from .experts_moe_pretrain import DeepSpeedMoE, DroplessMoE, Experts, FeedForward
from .peer_moe_pretrain import PEER, PEERExperts

MOE: dict[str, type[nn.Module]] = {"dropless": DroplessMoE, "deepspeed": DeepSpeedMoE, "peer": PEER}
# Parameters that stay fp32 in a model that is loaded in half precision.
FP32 = ("balance_bias", "running_mean", "running_variance", "up_rows", "gate_rows", "down_rows")


def norm(config: MoePretrainConfig) -> nn.Module:
    """A norm over the hidden dimension."""
    return NORMS[config.norm["kind"]](config.hidden_size, eps=config.norm["eps"])


# Releases before 5.24 call the cache past_key_values, in arguments and outputs.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class Block(nn.Module):
    """Attention, then a feed-forward or a mixture of experts.

    Pre-norm is x + f(norm(x)), post-norm is norm(x + f(x)).
    """

    def __init__(self, config: MoePretrainConfig, layer: int) -> None:
        super().__init__()
        self.pre_norm = config.norm_position == "pre"
        self.attention_norm = norm(config)
        self.attention = ATTENTION[config.attention["kind"]](config, layer)
        self.feed_forward_norm = norm(config)
        if layer in config.moe_layers:
            assert config.moe is not None
            self.feed_forward = MOE[config.moe["kind"]](config)
        else:
            assert config.intermediate_size is not None
            self.feed_forward = FeedForward(config, config.intermediate_size)

    def forward(self, x_BSD: Tensor, where: Places, cache: Any) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        if self.pre_norm:
            x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), where, cache)
            return x_BSD + self.feed_forward(self.feed_forward_norm(x_BSD))
        x_BSD = self.attention_norm(x_BSD + self.attention(x_BSD, where, cache))
        return self.feed_forward_norm(x_BSD + self.feed_forward(x_BSD))


class MoePretrainForCausalLM(PreTrainedModel, GenerationMixin):
    """A decoder-only language model.

    It computes what the model computed in evaluation: no dropout, no noise, no router losses.
    """

    config: MoePretrainConfig
    config_class = MoePretrainConfig
    _no_split_modules = ["Block"]
    _tied_weights_keys = {"head.weight": "embedding.weight"}  # transformers 4 reads the names alone

    def __init__(self, config: MoePretrainConfig) -> None:
        super().__init__(config)
        size = config.embedding_size or config.hidden_size
        self.embedding = nn.Embedding(config.vocab_size, size)
        self.embedding_projection = (
            nn.Linear(size, config.hidden_size, bias=False) if config.embedding_size else None
        )
        learned = config.position["kind"] == "learned"
        self.position = (
            nn.Embedding(config.max_position_embeddings, config.hidden_size) if learned else None
        )
        self.layers = nn.ModuleList(
            Block(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.final_norm = norm(config) if config.final_norm else nn.Identity()
        self.head = nn.Linear(size, config.vocab_size, bias=config.head_bias)
        names = {name.split(".")[-1] for name, _ in self.named_parameters()}
        self._keep_in_fp32_modules_strict = [
            name for name in FP32 if name in names
        ]  # transformers 4 refuses others
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """Logits in fp32, and the cross-entropy of ``labels`` if they are given.

        Args:
            input_ids: [B, S] int64.
            attention_mask: [B, tokens in the cache + S], 0 for padding; all real by default.
            position_ids: [B, S]; by default each token's index among the real ones of its
                sequence.
            labels: [B, S] int64, the inputs themselves (they are shifted here), -100 for tokens
                without a loss.
            logits_to_keep: how many of the last tokens get logits, or which; 0 for all.
            past_key_values, cache: keys and values of earlier tokens; older releases of
                transformers pass them by the first name, newer ones by the second.
            others: what transformers may pass to any model, without a meaning here.

        Raises:
            TypeError: for a cache under another name: ignoring it would drop the text so far.
            ValueError: for an attention_mask of another shape, and for padding in a model that
                drops tokens, because padding would use up the capacity of the experts.
        """
        if unknown := [name for name, value in others.items() if isinstance(value, Cache)]:
            raise TypeError(
                f"this model takes a cache as past_key_values or cache, not as {unknown[0]}: use a"
                " release of transformers from 4.57 to 5.24"
            )
        cache = past_key_values if cache is None else cache
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache()
        real_BU = self._real_tokens(input_ids, attention_mask, cache)
        if position_ids is None:
            # Left padding must not shift positions: real tokens count from 0.
            position_ids = (real_BU.cumsum(dim=1) - 1).clamp_min(0)[:, -input_ids.shape[1] :]
        where = places(self.config, position_ids, real_BU)
        x_BSD = self.embedding(input_ids)
        if self.embedding_projection is not None:
            x_BSD = self.embedding_projection(x_BSD)
        if self.position is not None:
            x_BSD = x_BSD + self.position(position_ids)
        for block in self.layers:
            x_BSD = block(x_BSD, where, cache)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        x_BSD = self.final_norm(x_BSD[:, kept])
        if self.embedding_projection is not None:
            x_BSD = x_BSD @ self.embedding_projection.weight
        logits_BSV = self.head(x_BSD).float()
        loss = (
            None
            if labels is None
            else self.loss_function(
                logits=logits_BSV, labels=labels, vocab_size=self.config.vocab_size
            )
        )
        kept_cache: dict[str, Any] = {CACHE: cache}
        return CausalLMOutputWithPast(loss=loss, logits=logits_BSV, **kept_cache)

    def _real_tokens(
        self, input_ids: Tensor, attention_mask: Tensor | None, cache: Cache | None
    ) -> Tensor:
        """Which tokens are no padding: bool [B, U], U counting those in the cache too."""
        B, S = input_ids.shape
        U = S + (0 if cache is None else cache.get_seq_length())
        real_BU = (
            torch.ones(B, U, dtype=torch.bool, device=input_ids.device)
            if attention_mask is None
            else attention_mask.bool()
        )
        if real_BU.shape != (B, U):
            raise ValueError(
                f"attention_mask is {list(real_BU.shape)}, and must be [{B}, {U}]: of the tokens in"
                " the cache and of the new ones"
            )
        if self.config.drops_tokens and not real_BU.all():
            raise ValueError(
                "the experts of this model have a limited capacity, which padding would use up:"
                " give sequences of one length, or one by one"
            )
        return real_BU

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the embedding, as transformers asks for it."""
        return self.embedding

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the embedding."""
        self.embedding = value

    def get_output_embeddings(self) -> nn.Linear:
        """Return the head, as transformers asks for it."""
        return self.head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the head."""
        self.head = new_embeddings

    def _init_weights(self, module: nn.Module) -> None:
        """Initializes the parameters of a new model; transformers leaves loaded ones alone."""
        super()._init_weights(module)
        # Product keys are in a list of parameters, which is itself a module. Biases of experts,
        # which have two dimensions, stay zero.
        if isinstance(module, Experts | PEERExperts | nn.ParameterList):
            for matrix in module.parameters(recurse=False):
                if matrix.dim() == 3 or isinstance(module, nn.ParameterList):
                    nn.init.normal_(matrix, std=self.config.initializer_range)
