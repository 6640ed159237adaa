"""Speculative decoding with multi-token prediction as the draft (Leviathan et al. 2023).

arXiv 2211.17192. Each pass of the model checks one drafted token and returns the next one: one or
two new tokens a pass, from exactly the model's distribution.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pretrain.core.errors import ConfigError
from pretrain.evaluation.generation.generate import check_length, check_prompt, take_until_end
from pretrain.evaluation.generation.sampling import Sampling, draw, sampling_probabilities
from pretrain.model.decoder import DecoderLM


class DraftingModel(Protocol):
    """A model that also guesses the token after the next."""

    def extend(self, ids: list[int]) -> Tensor:
        """The logits [S, V] after each of the S tokens ``ids``, which follow all tokens so far."""

    def forget_last(self) -> None:
        """The last token of the last :meth:`extend` was not the right one."""

    def draft(self, next_ids: list[int]) -> Tensor:
        """The draft's logits [V] for the token after ``next_ids``.

        ``next_ids`` are the tokens that follow each of those of the last :meth:`extend`.
        """


@dataclass
class DraftCounts:
    """How many tokens were drafted, and how many of those the model accepted."""

    drafted: int = 0
    accepted: int = 0

    @property
    def accepted_share(self) -> float:
        """Accepted tokens of the drafted ones; 0 before the first."""
        return self.accepted / self.drafted if self.drafted else 0.0


class NativeDrafting:
    """One of our models with new caches for ``max_tokens`` tokens, prompt included.

    The draft's cache holds tokens that are certain only, so that nothing in it is ever taken back.

    Raises:
        ConfigError: if they are more than the model's longest sequence.
    """

    def __init__(self, model: DecoderLM, max_tokens: int, device: torch.device) -> None:
        check_length(max_tokens, model.config.max_position_embeddings)
        self.model = model
        self.device = device
        dtype = next(model.parameters()).dtype
        self.cache = model.new_cache(1, max_tokens, device, dtype)
        self.draft_cache = model.new_draft_cache(1, max_tokens, device, dtype)
        self._hidden_BSD: Tensor

    @torch.inference_mode()
    def extend(self, ids: list[int]) -> Tensor:
        """Return the logits [tokens, vocabulary] of new tokens, which enter the cache."""
        self._hidden_BSD = self.model.hidden(
            torch.tensor([ids], device=self.device), cache=self.cache
        )
        return self.model.project(self._hidden_BSD)[0]

    def forget_last(self) -> None:
        """Take the last token back, whose draft was rejected."""
        self.cache.length -= 1
        self._hidden_BSD = self._hidden_BSD[:, :-1]

    @torch.inference_mode()
    def draft(self, next_ids: list[int]) -> Tensor:
        """Return the logits [vocabulary] of the token after ``next_ids``."""
        return self.model.draft_logits(
            self._hidden_BSD, torch.tensor([next_ids], device=self.device), self.draft_cache
        )[0, -1]


def residual(p_V: Tensor, q_V: Tensor) -> Tensor:
    """The distribution after a rejected draft, not normalised: the positive part of p - q."""
    positive_V = (p_V - q_V).clamp_min(0)
    # Where p and q are equal but for rounding there may be none: then a draft is as good as a draw
    # from p.
    return positive_V if positive_V.any() else p_V


def speculate(
    model: DraftingModel, prompt_ids: list[int], sampling: Sampling, counts: DraftCounts
) -> Iterator[int]:
    """Yields new tokens without end, from the distribution of ``sampling`` on the model's logits.

    Adds to ``counts`` meanwhile.

    Raises:
        ConfigError: for an empty prompt, or with a repetition penalty: what it is for would change
            inside of a pass.
    """
    check_prompt(prompt_ids)
    if sampling.repetition_penalty != 1.0:
        raise ConfigError(
            "drafts do not go with a repetition penalty: leave --draft or --repetition-penalty out"
        )
    generator = torch.Generator().manual_seed(sampling.seed)

    def distribution(logits_V: Tensor) -> Tensor:
        return sampling_probabilities(logits_V.cpu(), sampling)

    token = draw(distribution(model.extend(prompt_ids)[-1]), generator)
    yield token
    following = [*prompt_ids[1:], token]
    while True:
        q_V = distribution(model.draft(following))
        drafted = draw(q_V, generator)
        logits_2V = model.extend([token, drafted])
        p_V = distribution(logits_2V[0])
        counts.drafted += 1
        # Accepted with the probability min(1, p / q), without dividing by q.
        if float(torch.rand((), generator=generator)) * q_V[drafted] < p_V[drafted]:
            counts.accepted += 1
            yield drafted
            token = draw(distribution(logits_2V[1]), generator)
            following = [drafted, token]
        else:
            # The model has already read the rejected token: it must leave the cache.
            model.forget_last()
            token = draw(residual(p_V, q_V), generator)
            following = [token]
        yield token


def generate_with_drafts(
    model: DraftingModel,
    prompt_ids: list[int],
    sampling: Sampling,
    eod_id: int,
    steps: Iterable[int],
) -> tuple[list[int], DraftCounts]:
    """As :func:`pretrain.evaluation.generation.generate.generate`, with fewer passes of the model.

    Greedy decoding gives the same tokens as without drafts: all that counts is the largest logit.
    Two tokens at once may change its last bits against one token at a time, so a tie of two logits
    to the last bit could fall otherwise.
    """
    counts = DraftCounts()
    return take_until_end(speculate(model, prompt_ids, sampling, counts), eod_id, steps), counts
