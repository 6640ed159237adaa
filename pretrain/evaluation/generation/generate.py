"""Generates tokens with a cache, one a step, for one text or for several at once.

Texts of one batch are right-aligned. The padding to the left of a shorter prompt is masked like
another document, and does not count in positions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pretrain.core.errors import ConfigError
from pretrain.evaluation.generation.sampling import Sampling, draw_all
from pretrain.model.decoder import DecoderLM

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Takes the tokens that were added to B texts since the last call, [B, S] int64, and returns the
# logits of their next tokens, [B, V].
NextLogits = Callable[[Tensor], Tensor]

ONE_TEXT = (0,)


def right_aligned(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, list[int]]:
    """Prompts as int64 [B, S], padded with zeros at the left, and the padding of each."""
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    return (
        torch.tensor(
            [[0] * missing + list(prompt) for missing, prompt in zip(padding, prompts, strict=True)]
        ),
        padding,
    )


def generate(
    next_logits: NextLogits,
    prompt_ids: list[int],
    sampling: Sampling,
    eod_id: int,
    steps: Iterable[int],
) -> list[int]:
    """Continues a prompt until a document ends; returns the new tokens, the last one included.

    Args:
        next_logits: a model with its cache.
        steps: one item a token; ``range(max_new_tokens)``.

    Raises:
        ConfigError: if the prompt is empty; a text from nothing starts with the end-of-document
            token.
    """
    return take_until_end(
        (token for (token,) in continue_prompts(next_logits, [prompt_ids], sampling)), eod_id, steps
    )


def continue_prompts(
    next_logits: NextLogits, prompts: Sequence[Sequence[int]], sampling: Sampling
) -> Iterator[list[int]]:
    """Yields the next token of each text, without end.

    Text i draws with seed + i, so that it does not depend on the other texts of its batch.

    Raises:
        ConfigError: for an empty prompt.
    """
    for prompt in prompts:
        check_prompt(prompt)
    generators = [
        torch.Generator().manual_seed(sampling.seed + number) for number in range(len(prompts))
    ]
    seen_BV: Tensor | None = None
    added_BS, _ = right_aligned(prompts)
    while True:
        # Sampled on the CPU: generators of different devices draw different numbers.
        logits_BV = next_logits(added_BS).cpu()
        if sampling.repetition_penalty != 1.0:
            if seen_BV is None:
                seen_BV = torch.zeros_like(logits_BV, dtype=torch.bool)
                for row, prompt in enumerate(prompts):
                    seen_BV[row, list(prompt)] = True
            else:
                # Padding is never in added_BS here: only the first call has any.
                seen_BV.scatter_(1, added_BS, True)
        tokens = draw_all(logits_BV, sampling, seen_BV, generators)
        yield tokens
        added_BS = torch.tensor(tokens)[:, None]


def take_until_end(tokens: Iterator[int], eod_id: int, steps: Iterable[int]) -> list[int]:
    """A token a step, up to the end of a document or of the steps."""
    taken: list[int] = []
    for _, token in zip(steps, tokens, strict=False):
        taken.append(token)
        if token == eod_id:
            break
    return taken


def check_prompt(prompt_ids: Sequence[int]) -> None:
    """Raises :class:`ConfigError` for an empty prompt."""
    if not prompt_ids:
        raise ConfigError(
            "the prompt has no tokens: start with the end-of-document token to write a new document"
        )


class _Alignment:
    """Which tokens of right-aligned texts are padding, call by call."""

    def __init__(self, padding: Sequence[int], device: torch.device) -> None:
        self.padding_B1 = torch.tensor(padding, device=device)[:, None]
        self.padded = any(padding)
        self.length = 0

    def extend(self, count: int) -> tuple[Tensor | None, Tensor | None]:
        """Positions [B, count] of ``count`` more tokens, and the mask [B, length] of all so far.

        The mask is 0 for padding. Both are None if there is no padding.
        """
        first = self.length
        self.length = self.length + count
        if not self.padded:
            return None, None
        places_1U = torch.arange(self.length, device=self.padding_B1.device)[None]
        # Positions of padding are arbitrary, as it is masked; negative ones would not be allowed.
        return (places_1U[:, first:] - self.padding_B1).clamp_min(0), (
            places_1U >= self.padding_B1
        ).long()


def native_next_logits(
    model: DecoderLM, max_tokens: int, device: torch.device, padding: Sequence[int] = ONE_TEXT
) -> NextLogits:
    """One of our models with a new cache for texts of ``max_tokens`` tokens, prompt included.

    ``padding`` of each text's first call.

    Raises:
        ConfigError: if they are more than the model's longest sequence.
    """
    check_length(max_tokens, model.config.max_position_embeddings)
    # Allocated once for the longest text, so that no step copies the cache.
    cache = model.new_cache(len(padding), max_tokens, device, next(model.parameters()).dtype)
    alignment = _Alignment(padding, device)

    @torch.inference_mode()
    def next_logits(added_BS: Tensor) -> Tensor:
        positions_BS, present_BU = alignment.extend(added_BS.shape[1])
        x_BSD = model.hidden(added_BS.to(device), present_BU, cache, positions_BS)
        # Only the last token's logits: those of a long prompt would take [B, S, V] of memory.
        return model.project(x_BSD[:, -1:])[:, 0]

    return next_logits


def transformers_next_logits(
    model: PreTrainedModel, max_tokens: int, device: torch.device, padding: Sequence[int] = ONE_TEXT
) -> NextLogits:
    """A Hugging Face model with a new cache; raises as :func:`native_next_logits` does."""
    from transformers import DynamicCache

    check_length(max_tokens, model.config.max_position_embeddings)
    cache = DynamicCache(config=model.config)
    alignment = _Alignment(padding, device)
    parameters = inspect.signature(model.forward).parameters
    # Older releases of transformers call it past_key_values.
    cache_name = "cache" if "cache" in parameters else "past_key_values"

    @torch.inference_mode()
    def next_logits(added_BS: Tensor) -> Tensor:
        positions_BS, present_BU = alignment.extend(added_BS.shape[1])
        # Models with ALiBi take no positions: they count what the mask leaves.
        inputs: dict[str, object] = {cache_name: cache}
        if "position_ids" in parameters and positions_BS is not None:
            inputs["position_ids"] = positions_BS
        logits_BSV = model(
            input_ids=added_BS.to(device), attention_mask=present_BU, use_cache=True, **inputs
        ).logits
        return logits_BSV[:, -1]

    return next_logits


def check_length(max_tokens: int, longest: int) -> None:
    """Raises :class:`ConfigError` if a text would be longer than the model's longest sequence."""
    if max_tokens > longest:
        raise ConfigError(
            f"prompt and continuation take {max_tokens} tokens, the model has {longest} positions:"
            " shorten the one or the other"
        )
