"""A router's scores, choice, weights and statistics in one pass over the logits, and its gradient.

One program computes a few tokens, all experts of each at once. Nothing is added atomically. Of
equal scores the expert with the lowest index is chosen first; torch's topk leaves that open.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import custom_op

# Logits that a program holds at once.
TILE = 1024
# The bound of ``Router.weights`` and ``Router.probabilities``.
SMALLEST_SUM = 1e-20


@triton.jit
def _softmax(logits_TE: tl.tensor) -> tl.tensor:
    shifted_TE = tl.exp(logits_TE - tl.max(logits_TE, axis=1)[:, None])
    return shifted_TE / tl.sum(shifted_TE, axis=1)[:, None]


@triton.jit
def _scores(logits_TE: tl.tensor, temperature: tl.tensor, SIGMOID: tl.constexpr) -> tl.tensor:
    """Scores; those of the columns past the last expert, whose logits are -inf, are 0."""
    if SIGMOID:
        return 1.0 / (1.0 + tl.exp(-logits_TE))
    return _softmax(logits_TE / temperature)


@triton.jit
def _route_kernel(
    probs_TE: tl.tensor,
    ids_TK: tl.tensor,
    weights_TK: tl.tensor,
    logsumexp_T: tl.tensor,
    entropy_T: tl.tensor,
    logits_TE: tl.tensor,
    bias_E: tl.tensor,
    given_TK: tl.tensor,
    T: tl.tensor,
    temperature: tl.tensor,
    factor: tl.tensor,
    smallest_sum: tl.tensor,
    E: tl.constexpr,
    K: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALIZED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_GIVEN: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    is_token = token < T
    expert = tl.arange(0, EXPERTS)[None, :]
    there = is_token[:, None] & (expert < E)
    place = token[:, None] * E + expert
    # Rows past the last token have logits of 0, so that they compute nothing undefined.
    logits = tl.load(logits_TE + place, mask=there, other=0.0)
    logits = tl.where(expert < E, logits, float("-inf"))
    scores = _scores(logits, temperature, SIGMOID)
    probs = scores
    if SIGMOID:
        probs = scores / tl.maximum(tl.sum(scores, axis=1), smallest_sum)[:, None]
    tl.store(probs_TE + place, probs, mask=there)
    summands = probs * tl.log(tl.where(probs == 0.0, 1.0, probs))
    tl.store(entropy_T + token, -tl.sum(summands, axis=1), mask=is_token)
    largest = tl.max(logits, axis=1)
    sums = tl.sum(tl.exp(logits - largest[:, None]), axis=1)
    tl.store(logsumexp_T + token, largest + tl.log(sums), mask=is_token)
    choice = tl.arange(0, CHOICES)[None, :]
    ids = tl.zeros((TOKENS, CHOICES), tl.int32)
    weights = tl.zeros((TOKENS, CHOICES), tl.float32)
    left = scores
    if HAS_BIAS:
        left += tl.load(bias_E + expert, mask=expert < E, other=0.0)
    # NaN is the largest, as for torch: no index is out of range then.
    left = tl.where(left != left, float("inf"), left)
    left = tl.where(expert < E, left, float("-inf"))
    for k in range(K):
        if IS_GIVEN:
            best = tl.load(given_TK + token * K + k, mask=is_token, other=0).to(tl.int32)
        else:
            is_best = left == tl.max(left, axis=1)[:, None]
            best = tl.min(tl.where(is_best, expert, EXPERTS), axis=1)
        is_chosen = expert == best[:, None]
        score = tl.sum(tl.where(is_chosen, scores, 0.0), axis=1)
        left = tl.where(is_chosen, float("-inf"), left)
        ids = tl.where(choice == k, best[:, None], ids)
        weights = tl.where(choice == k, score[:, None], weights)
    if NORMALIZED:
        weights = weights / tl.maximum(tl.sum(weights, axis=1), smallest_sum)[:, None]
    is_choice = is_token[:, None] & (choice < K)
    tl.store(ids_TK + token[:, None] * K + choice, ids.to(tl.int64), mask=is_choice)
    tl.store(weights_TK + token[:, None] * K + choice, weights * factor, mask=is_choice)


@triton.jit
def _route_backward_kernel(
    logits_gradient_TE: tl.tensor,
    probs_gradient_TE: tl.tensor,
    weights_gradient_TK: tl.tensor,
    logsumexp_gradient_T: tl.tensor,
    logits_TE: tl.tensor,
    ids_TK: tl.tensor,
    T: tl.tensor,
    temperature: tl.tensor,
    factor: tl.tensor,
    smallest_sum: tl.tensor,
    E: tl.constexpr,
    K: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALIZED: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    is_token = token < T
    expert = tl.arange(0, EXPERTS)[None, :]
    there = is_token[:, None] & (expert < E)
    place = token[:, None] * E + expert
    logits = tl.load(logits_TE + place, mask=there, other=0.0)
    logits = tl.where(expert < E, logits, float("-inf"))
    scores = _scores(logits, temperature, SIGMOID)
    gradient = tl.load(probs_gradient_TE + place, mask=there, other=0.0)
    if SIGMOID:
        # Through the division by the sum, which is constant where the bound holds.
        total = tl.sum(scores, axis=1)
        bounded = tl.maximum(total, smallest_sum)
        inner = tl.sum(gradient * scores, axis=1) / bounded
        inner = tl.where(total >= smallest_sum, inner, 0.0)
        gradient = (gradient - inner[:, None]) / bounded[:, None]
    chosen_sum = tl.zeros((TOKENS,), tl.float32)
    chosen_inner = tl.zeros((TOKENS,), tl.float32)
    for k in range(K):
        best = tl.load(ids_TK + token * K + k, mask=is_token, other=0)
        weight_gradient = tl.load(weights_gradient_TK + token * K + k, mask=is_token, other=0.0)
        score = tl.sum(tl.where(expert == best[:, None], scores, 0.0), axis=1)
        chosen_sum += score
        chosen_inner += weight_gradient * score
    divisor = tl.full((TOKENS,), 1.0, tl.float32)
    common = tl.zeros((TOKENS,), tl.float32)
    if NORMALIZED:
        divisor = tl.maximum(chosen_sum, smallest_sum)
        common = tl.where(chosen_sum >= smallest_sum, chosen_inner / divisor, 0.0)
    for k in range(K):
        best = tl.load(ids_TK + token * K + k, mask=is_token, other=0)
        weight_gradient = tl.load(weights_gradient_TK + token * K + k, mask=is_token, other=0.0)
        score_gradient = factor * (weight_gradient - common) / divisor
        gradient += tl.where(expert == best[:, None], score_gradient[:, None], 0.0)
    if SIGMOID:
        gradient = gradient * scores * (1.0 - scores)
    else:
        inner = tl.sum(gradient * scores, axis=1)
        gradient = (gradient - inner[:, None]) * scores / temperature
    logsumexp_gradient = tl.load(logsumexp_gradient_T + token, mask=is_token, other=0.0)
    gradient += logsumexp_gradient[:, None] * _softmax(logits)
    tl.store(logits_gradient_TE + place, gradient, mask=there)


def _tile(num_experts: int) -> tuple[int, int]:
    """Tokens and experts that a program computes at once, both powers of two."""
    experts = triton.next_power_of_2(num_experts)
    return max(TILE // experts, 1), experts


@custom_op("pretrain::route", mutates_args=())
def route(
    logits_TE: torch.Tensor,
    bias_E: torch.Tensor | None,
    given_TK: torch.Tensor | None,
    top_k: int,
    sigmoid: bool,
    temperature: float,
    normalized: bool,
    factor: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The choice of a router from its fp32 logits; its plain reference is ``TopKRouter``.

    Args:
        bias_E: added to the scores for the choice alone.
        given_TK: int64 ids to use in place of a choice.
        sigmoid: scores are sigmoids of the logits; otherwise their softmax over ``temperature``.
        normalized: the chosen scores are divided by their sum.
        factor: the weights are multiplied by this.

    Returns:
        Probabilities [T, E], ids [T, K] int64, weights [T, K], logsumexp of the logits [T], and
        entropy of the probabilities [T] in nats, which has no gradient.
    """
    T, E = logits_TE.shape
    logits_TE = logits_TE.contiguous()
    probs_TE, ids_TK, weights_TK, logsumexp_T, entropy_T = _outputs(logits_TE, top_k)
    if T:
        tokens, experts = _tile(E)
        # Triton launches on the current device, which need not be the tensors'.
        with torch.cuda.device_of(logits_TE):
            _route_kernel[(triton.cdiv(T, tokens),)](
                probs_TE,
                ids_TK,
                weights_TK,
                logsumexp_T,
                entropy_T,
                logits_TE,
                # A pointer that is not read, where there is none.
                logits_TE if bias_E is None else bias_E.contiguous(),
                ids_TK if given_TK is None else given_TK.contiguous(),
                T,
                temperature,
                factor,
                SMALLEST_SUM,
                E,
                top_k,
                sigmoid,
                normalized,
                bias_E is not None,
                given_TK is not None,
                tokens,
                experts,
                triton.next_power_of_2(top_k),
            )
    return probs_TE, ids_TK, weights_TK, logsumexp_T, entropy_T


def _outputs(
    logits_TE: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    T = logits_TE.shape[0]
    weights_TK = logits_TE.new_empty(T, top_k)
    return (
        torch.empty_like(logits_TE, memory_format=torch.contiguous_format),
        torch.empty_like(weights_TK, dtype=torch.int64),
        weights_TK,
        logits_TE.new_empty(T),
        logits_TE.new_empty(T),
    )


@route.register_fake
def _(
    logits_TE: torch.Tensor,
    bias_E: torch.Tensor | None,
    given_TK: torch.Tensor | None,
    top_k: int,
    sigmoid: bool,
    temperature: float,
    normalized: bool,
    factor: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return _outputs(logits_TE, top_k)


@custom_op("pretrain::route_backward", mutates_args=())
def route_backward(
    probs_gradient_TE: torch.Tensor,
    weights_gradient_TK: torch.Tensor,
    logsumexp_gradient_T: torch.Tensor,
    logits_TE: torch.Tensor,
    ids_TK: torch.Tensor,
    sigmoid: bool,
    temperature: float,
    normalized: bool,
    factor: float,
) -> torch.Tensor:
    """The gradient of the logits of :func:`route`, fp32 [T, E]; scores are computed again."""
    T, E = logits_TE.shape
    logits_TE = logits_TE.contiguous()
    logits_gradient_TE = torch.empty_like(logits_TE)
    if T:
        tokens, experts = _tile(E)
        with torch.cuda.device_of(logits_TE):
            _route_backward_kernel[(triton.cdiv(T, tokens),)](
                logits_gradient_TE,
                probs_gradient_TE.contiguous(),
                weights_gradient_TK.contiguous(),
                logsumexp_gradient_T.contiguous(),
                logits_TE,
                ids_TK.contiguous(),
                T,
                temperature,
                factor,
                SMALLEST_SUM,
                E,
                ids_TK.shape[1],
                sigmoid,
                normalized,
                tokens,
                experts,
            )
    return logits_gradient_TE


@route_backward.register_fake
def _(
    probs_gradient_TE: torch.Tensor,
    weights_gradient_TK: torch.Tensor,
    logsumexp_gradient_T: torch.Tensor,
    logits_TE: torch.Tensor,
    ids_TK: torch.Tensor,
    sigmoid: bool,
    temperature: float,
    normalized: bool,
    factor: float,
) -> torch.Tensor:
    return torch.empty_like(logits_TE, memory_format=torch.contiguous_format)


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.settings = inputs[4:]
    ctx.save_for_backward(inputs[0], output[1])


def _backward(ctx, *gradients):  # type: ignore[no-untyped-def]
    probs_TE, _, weights_TK, logsumexp_T, _ = gradients
    gradient_TE = route_backward(
        probs_TE, weights_TK, logsumexp_T, *ctx.saved_tensors, *ctx.settings
    )
    return gradient_TE, None, None, None, None, None, None, None


route.register_autograd(_backward, setup_context=_keep)
