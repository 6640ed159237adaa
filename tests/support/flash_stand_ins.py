"""Functions of the package flash_attn and of torch that need CUDA, by their documentation."""

from __future__ import annotations

import types

import torch


def flash_attn_func(
    q_BSNH: torch.Tensor,
    k_BUMH: torch.Tensor,
    v_BUMH: torch.Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    alibi_slopes: torch.Tensor | None,
) -> torch.Tensor:
    """The package's documented function in plain arithmetic: the last query sees the last key."""
    size, groups = q_BSNH.shape[3], q_BSNH.shape[2] // k_BUMH.shape[2]
    assert causal and dropout_p == 0 and size % 8 == 0 and v_BUMH.shape[3] == size <= 256
    q, k, v = (x.transpose(1, 2) for x in (q_BSNH, k_BUMH, v_BUMH))
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    queries, keys = torch.arange(q.shape[2]), torch.arange(k.shape[2])
    distance = (queries + k.shape[2] - q.shape[2])[:, None] - keys
    logits = q @ k.transpose(-2, -1) * softmax_scale
    if alibi_slopes is not None:
        logits = logits - alibi_slopes[:, None, None] * distance.abs()
    hidden = distance < 0
    if window_size[0] >= 0:
        hidden = hidden | (distance > window_size[0])
    weights = logits.masked_fill(hidden, float("-inf")).softmax(dim=-1)
    return (weights @ v).transpose(1, 2)


def flash_attn_varlen_func(
    q_TNH: torch.Tensor,
    k_TMH: torch.Tensor,
    v_TMH: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    alibi_slopes: torch.Tensor | None,
) -> torch.Tensor:
    """Each sequence by itself: its queries and keys are those between two of the places."""
    outputs = []
    for places, most, rows in (
        (cu_seqlens_q, max_seqlen_q, q_TNH),
        (cu_seqlens_k, max_seqlen_k, k_TMH),
    ):
        lengths = places.diff()
        assert places.dtype == torch.int32 and places[0] == 0 and places[-1] == len(rows)
        assert lengths.min() >= 0 and lengths.max() <= most
    for number in range(len(cu_seqlens_q) - 1):
        queries, keys = (
            slice(int(places[number]), int(places[number + 1]))
            for places in (cu_seqlens_q, cu_seqlens_k)
        )
        if queries.start == queries.stop:
            continue
        parts = (
            rows[part][None] for rows, part in ((q_TNH, queries), (k_TMH, keys), (v_TMH, keys))
        )
        outputs.append(
            flash_attn_func(*parts, dropout_p, softmax_scale, causal, window_size, alibi_slopes)[0]
        )
    return torch.cat(outputs)


def varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> torch.Tensor:
    """torch's function, causal because no key after the query is in its window."""
    assert window_size[1] == 0 and enable_gqa == (query.shape[1] != key.shape[1])
    lengths = (cu_seq_q, cu_seq_k, max_q, max_k)
    return flash_attn_varlen_func(query, key, value, *lengths, 0.0, scale, True, window_size, None)


def flash_package() -> types.ModuleType:
    """A module like ``flash_attn``."""
    package = types.ModuleType("flash_attn")
    package.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    package.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    return package
