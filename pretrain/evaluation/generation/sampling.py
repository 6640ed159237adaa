"""Sampling of the next token, as pure functions on logits over the last dimension.

Excluded tokens get the logit -inf. The order is that of transformers' ``generate``: repetition
penalty, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.core.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: logits are divided by it.
        top_k: keeps that many tokens.
        top_p: keeps the fewest tokens that hold this probability together (Holtzman et al. 2020).
        min_p: keeps tokens with at least this share of the likeliest one's probability (Nguyen et
            al. 2024).
        repetition_penalty: of tokens that the prompt or the text already has (Keskar et al. 2019);
            1 is none.
        greedy: always the likeliest token; only the repetition penalty still counts.
        seed: of the first text; each further one has the next seed.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    greedy: bool = False
    seed: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ConfigError(
                f"the temperature is {self.temperature}: give one above 0, or ask for greedy"
                " decoding"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top-k is {self.top_k}: keep at least 1 token")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top-p is {self.top_p}: give a probability above 0 and at most 1")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ConfigError(f"min-p is {self.min_p}: give a share from 0 to 1")
        if not self.repetition_penalty > 0:
            raise ConfigError(
                f"the repetition penalty is {self.repetition_penalty}: give one above 0, 1 for none"
            )


def penalize_repetition(logits_V: Tensor, seen_V: Tensor, penalty: float) -> Tensor:
    """Logits with a penalty on the tokens in ``seen_V`` (bool) (Keskar et al. 2019).

    Positive ones are divided by it, negative ones multiplied: both become less likely.
    """
    return torch.where(
        seen_V, torch.where(logits_V > 0, logits_V / penalty, logits_V * penalty), logits_V
    )


def keep_top_k(logits_V: Tensor, top_k: int) -> Tensor:
    """The ``top_k`` largest."""
    # Exactly k tokens, even if several are equal at the border; a threshold would keep more.
    kept = logits_V.topk(min(top_k, logits_V.shape[-1]), dim=-1)
    return torch.full_like(logits_V, -torch.inf).scatter(-1, kept.indices, kept.values)


def keep_top_p(logits_V: Tensor, top_p: float) -> Tensor:
    """The fewest likeliest tokens whose probabilities reach ``top_p`` together; at least one."""
    sorted_V, order_V = logits_V.sort(dim=-1, descending=True, stable=True)
    probs_V = sorted_V.softmax(dim=-1)
    # A token stays as long as the ones before it do not yet reach top_p: the first always does.
    removed_V = probs_V.cumsum(dim=-1) - probs_V >= top_p
    return logits_V.masked_fill(
        torch.zeros_like(removed_V).scatter(-1, order_V, removed_V), -torch.inf
    )


def keep_min_p(logits_V: Tensor, min_p: float) -> Tensor:
    """Tokens that have at least ``min_p`` times the probability of the likeliest one."""
    probs_V = logits_V.softmax(dim=-1)
    return logits_V.masked_fill(probs_V < min_p * probs_V.amax(dim=-1, keepdim=True), -torch.inf)


def sampling_probabilities(
    logits_V: Tensor, sampling: Sampling, seen_V: Tensor | None = None
) -> Tensor:
    """The distribution [..., V], fp32, that the next token is drawn from.

    Greedy, all of it on the likeliest token.

    Args:
        seen_V: bool [..., V], the tokens that a repetition penalty is for.
    """
    # The order matters: min-p and top-p depend on the temperature and on what top-k has left.
    scaled_V = _penalized(logits_V, sampling, seen_V)
    if sampling.greedy:
        return torch.zeros_like(scaled_V).scatter(-1, scaled_V.argmax(dim=-1, keepdim=True), 1.0)
    scaled_V = scaled_V / sampling.temperature
    if sampling.top_k is not None:
        scaled_V = keep_top_k(scaled_V, sampling.top_k)
    if sampling.top_p is not None:
        scaled_V = keep_top_p(scaled_V, sampling.top_p)
    if sampling.min_p is not None:
        scaled_V = keep_min_p(scaled_V, sampling.min_p)
    return scaled_V.softmax(dim=-1)


def _penalized(logits_V: Tensor, sampling: Sampling, seen_V: Tensor | None) -> Tensor:
    return (
        logits_V.float()
        if seen_V is None
        else penalize_repetition(logits_V.float(), seen_V, sampling.repetition_penalty)
    )


def draw(probs_V: Tensor, generator: torch.Generator) -> int:
    """A token from a distribution [V], up to a factor."""
    # multinomial normalises: weights need not add up to 1.
    return int(torch.multinomial(probs_V, 1, generator=generator))


def draw_all(
    logits_BV: Tensor,
    sampling: Sampling,
    seen_BV: Tensor | None,
    generators: Sequence[torch.Generator],
) -> list[int]:
    """The next token of each of B texts, which draws from its own generator, or nothing if greedy.

    Args:
        seen_BV: as in :func:`sampling_probabilities`.
    """
    if sampling.greedy:
        # The temperature and the cuts never change which token is the likeliest.
        return _penalized(logits_BV, sampling, seen_BV).argmax(dim=-1).tolist()
    probs_BV = sampling_probabilities(logits_BV, sampling, seen_BV)
    return [
        draw(probs_V, generator) for probs_V, generator in zip(probs_BV, generators, strict=True)
    ]
