"""Text from a model, a token at a time: sampling that works the same for our models and for Hugging Face's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pretrain.config.errors import ConfigError
from pretrain.model.decoder import DecoderLM

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Takes the tokens that were added since the last call, [1, S] int64, and returns the next token's logits [V].
NextLogits = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. ``top_k`` keeps that many tokens, ``top_p`` the fewest that hold this probability together."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    greedy: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ConfigError(f"the temperature is {self.temperature}: give one above 0, or ask for greedy decoding")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top-k is {self.top_k}: keep at least 1 token")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top-p is {self.top_p}: give a probability above 0 and at most 1")


def sampling_probabilities(logits_V: Tensor, sampling: Sampling) -> Tensor:
    """The distribution [V], fp32, that the next token is drawn from: temperature, then top-k, then top-p (Holtzman et al. 2020).

    Greedy, all of it on the likeliest token.
    """
    if sampling.greedy:
        return torch.zeros_like(logits_V, dtype=torch.float32).index_fill(0, logits_V.argmax(), 1.0)
    scaled_V = logits_V.float() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < len(scaled_V):
        kept = scaled_V.topk(sampling.top_k).indices
        scaled_V = torch.full_like(scaled_V, -torch.inf).scatter(0, kept, scaled_V[kept])
    probs_V = scaled_V.softmax(dim=0)
    if sampling.top_p is not None:
        sorted_V, order_V = probs_V.sort(descending=True, stable=True)
        # A token stays as long as the ones before it do not yet reach top_p: the first always does.
        sorted_V = sorted_V.masked_fill(sorted_V.cumsum(0) - sorted_V >= sampling.top_p, 0.0)
        probs_V = torch.zeros_like(probs_V).scatter(0, order_V, sorted_V)
        probs_V = probs_V / probs_V.sum()
    return probs_V


def generate(
    next_logits: NextLogits,
    prompt_ids: list[int],
    sampling: Sampling,
    eod_id: int,
    steps: Iterable[int],
) -> list[int]:
    """Continues ``prompt_ids`` by one token a step, until a document ends; returns the new tokens, the end-of-document token included.

    Args:
        next_logits: a model with its cache.
        steps: one item a token, so that a caller can show progress; ``range(max_new_tokens)``.

    Raises:
        ConfigError: when the prompt is empty; a text from nothing starts with the end-of-document token.
    """
    check_prompt(prompt_ids)
    return take_until_end(_continue(next_logits, prompt_ids, sampling), eod_id, steps)


def _continue(next_logits: NextLogits, prompt_ids: list[int], sampling: Sampling) -> Iterator[int]:
    """New tokens without end."""
    generator = torch.Generator().manual_seed(sampling.seed)
    added = prompt_ids
    while True:
        logits_V = next_logits(torch.tensor([added], dtype=torch.int64)).cpu()
        token = draw(sampling_probabilities(logits_V, sampling), generator)
        yield token
        added = [token]


def draw(probs_V: Tensor, generator: torch.Generator) -> int:
    """A token from a distribution, up to a factor."""
    return int(torch.multinomial(probs_V, 1, generator=generator))


def take_until_end(tokens: Iterator[int], eod_id: int, steps: Iterable[int]) -> list[int]:
    """A token a step, up to the end of a document or of the steps."""
    taken: list[int] = []
    for _, token in zip(steps, tokens, strict=False):
        taken.append(token)
        if token == eod_id:
            break
    return taken


def check_prompt(prompt_ids: list[int]) -> None:
    """Raises :class:`ConfigError` for an empty prompt."""
    if not prompt_ids:
        raise ConfigError("the prompt has no tokens: start with the end-of-document token to write a new document")


def native_next_logits(model: DecoderLM, max_tokens: int, device: torch.device) -> NextLogits:
    """One of our models with a new cache for ``max_tokens`` tokens, prompt included.

    Raises:
        ConfigError: when they are more than the model's longest sequence.
    """
    check_length(max_tokens, model.config.max_position_embeddings)
    cache = model.new_cache(1, max_tokens, device, next(model.parameters()).dtype)

    @torch.inference_mode()
    def next_logits(added_BS: Tensor) -> Tensor:
        return model.logits(added_BS.to(device), cache=cache)[0, -1]

    return next_logits


def transformers_next_logits(model: PreTrainedModel, max_tokens: int, device: torch.device) -> NextLogits:
    """A Hugging Face model with a new cache; raises as :func:`native_next_logits` does."""
    from transformers import DynamicCache

    check_length(max_tokens, model.config.max_position_embeddings)
    cache = DynamicCache(config=model.config)

    @torch.inference_mode()
    def next_logits(added_BS: Tensor) -> Tensor:
        return model(input_ids=added_BS.to(device), past_key_values=cache, use_cache=True).logits[0, -1]

    return next_logits


def check_length(max_tokens: int, longest: int) -> None:
    """Raises :class:`ConfigError` where a text would be longer than the longest sequence of the model."""
    if max_tokens > longest:
        raise ConfigError(f"prompt and continuation take {max_tokens} tokens, the model has {longest} positions: shorten the one or the other")
