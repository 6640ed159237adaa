"""Positions and attention.

Shapes, in all files of this class: B batch, S new tokens, U tokens with those in the cache, D
hidden, N query heads, M key/value heads, H dimensions of a head, T = B * S, E experts, K experts a
token.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .configuration_moe_pretrain import MoePretrainConfig


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension, computed in fp32 (Zhang & Sennrich 2019).

    x / sqrt(mean(x^2) + eps) * weight.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # In fp32 also for bf16 weights, as in training.
        normed = x.float() * torch.rsqrt(x.float().square().mean(dim=-1, keepdim=True) + self.eps)
        return (normed * self.weight.float()).to(x.dtype)


NORMS: dict[str, type[nn.Module]] = {"rms_norm": RMSNorm, "layer_norm": nn.LayerNorm}


# --- positions ------------------------------------------------------------------------------------


class Places(NamedTuple):
    """Positions and masks of the tokens of one call.

    Attributes:
        rotations: cos and sin for each pair of a rotary embedding, fp32 [B, 1, S, pairs]; None for
            other kinds of positions.
        scale: a factor of all scores, besides 1 / sqrt(H).
        biases: for each window size of the model's layers, what is added to scores: -inf for keys
            that a query may not see; fp32 [B, 1 or N, S, U].
    """

    rotations: tuple[Tensor, Tensor] | None
    scale: float
    biases: dict[int | None, Tensor]


def places(config: MoePretrainConfig, position_ids_BS: Tensor, real_BU: Tensor) -> Places:
    """Positions of the new tokens, and which of all tokens are real and no padding."""
    rotations, scale = rotary_angles(config, position_ids_BS)
    windows = dict.fromkeys(config.sliding_windows)
    return Places(
        rotations,
        scale,
        {
            window: score_bias(config, position_ids_BS.shape[1], real_BU, window)
            for window in windows
        },
    )


def score_bias(config: MoePretrainConfig, S: int, real_BU: Tensor, window: int | None) -> Tensor:
    """Causality, the window, padding and ALiBi as one term of the scores.

    Every query sees its own token, even padding: the softmax of a row of -inf would be NaN.
    """
    U = real_BU.shape[1]
    device = real_BU.device
    distance_SU = torch.arange(U - S, U, device=device)[:, None] - torch.arange(U, device=device)
    seen_SU = distance_SU >= 0 if window is None else (distance_SU >= 0) & (distance_SU < window)
    # "&" binds tighter than "|": the own token is always visible.
    seen_BSU = seen_SU & real_BU[:, None] | (distance_SU == 0)
    bias = torch.zeros(1, 1, 1, 1, device=device)
    # ALiBi (Press et al. 2022): a key d tokens back loses slope * d.
    if config.position["kind"] in ("alibi", "rope_alibi"):
        bias = (
            -alibi_slopes(config.attention["num_attention_heads"], device)[:, None, None]
            * distance_SU
        )
    return torch.where(seen_BSU[:, None], bias, -math.inf)


def alibi_slopes(num_heads: int, device: torch.device) -> Tensor:
    """The slopes of ALiBi, fp32 [N]: 2^(-8/N), 2^(-16/N) ... 2^-8.

    If N is no power of two, those of the next lower power, then every second of the next higher
    one.
    """
    lower = 2 ** math.floor(math.log2(num_heads))
    exponents = [8 * (head + 1) / lower for head in range(lower)] + [
        4 * (head + 1) / lower for head in range(0, 2 * lower, 2)
    ]
    return 2.0 ** -torch.tensor(exponents[:num_heads], device=device)


def rotary_angles(
    config: MoePretrainConfig, position_ids_BS: Tensor
) -> tuple[tuple[Tensor, Tensor] | None, float]:
    """cos and sin of a rotary embedding (Su et al. 2021), and what scores are multiplied with.

    (None, 1) for the other kinds.
    """
    position = SimpleNamespace(**config.position)
    if position.kind not in ("rope", "yarn", "llama3", "rope_alibi"):
        return None, 1.0
    size = config.attention["qk_rope_head_dim" if config.attention["kind"] == "mla" else "head_dim"]
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device=position_ids_BS.device) / size
    frequencies = position.rope_theta**-exponents
    growth = 1.0
    scale = 1.0
    if position.kind == "yarn":
        frequencies, growth, scale = yarn(position, frequencies, size)
    elif position.kind == "llama3":
        frequencies = llama3(position, frequencies)
    # fp32: bf16 has too few digits for positions above 256.
    angles = position_ids_BS[:, None, :, None].float() * frequencies
    return (angles.cos() * growth, angles.sin() * growth), scale


def yarn(position: SimpleNamespace, frequencies: Tensor, size: int) -> tuple[Tensor, float, float]:
    """NTK by parts (Peng et al. 2023).

    A pair that rotates more than ``beta_fast`` times over the original length keeps its frequency,
    one that rotates less than ``beta_slow`` times has it divided by ``factor``; between them the
    divided share rises linearly.

    Returns:
        The new frequencies, a factor of rotated queries and keys, and one of all scores.
    """

    def pair(times: float) -> float:
        """The index of the pair that rotates this many times over the original length."""
        return (
            size
            * math.log(position.original_max_position_embeddings / (times * 2 * math.pi))
            / (2 * math.log(position.rope_theta))
        )

    first, last = pair(position.beta_fast), pair(position.beta_slow)
    if position.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    pairs = torch.arange(size // 2, dtype=torch.float32, device=frequencies.device)
    divided = ((pairs - first) / ((last - first) or 0.001)).clamp(0, 1)
    frequencies = frequencies / position.factor * divided + frequencies * (1 - divided)

    def growth(mscale: float) -> float:
        return 0.1 * mscale * math.log(position.factor) + 1

    # DeepSeek has one factor for all scores, and another one for the rotated part.
    if position.mscale is not None:
        return (
            frequencies,
            growth(position.mscale) / growth(position.mscale_all_dim),
            growth(position.mscale_all_dim) ** 2,
        )
    return (
        frequencies,
        growth(1.0) if position.attention_factor is None else position.attention_factor,
        1.0,
    )


def llama3(position: SimpleNamespace, frequencies: Tensor) -> Tensor:
    """Llama 3.1's new frequencies (``apply_scaling`` of Meta's llama-models).

    A pair that rotates more than ``high_freq_factor`` times over the original length keeps its
    frequency, one that rotates less than ``low_freq_factor`` times has it divided by ``factor``;
    between them the kept share rises linearly.
    """
    rotations = position.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = (rotations - position.low_freq_factor) / (
        position.high_freq_factor - position.low_freq_factor
    )
    kept = kept.clamp(0, 1)
    return frequencies * kept + frequencies / position.factor * (1 - kept)


def rotated(x_BNSH: Tensor, rotations: tuple[Tensor, Tensor] | None) -> Tensor:
    """Rotates each pair (x_i, x_{i + H/2}) by its angle, in fp32."""
    if rotations is None:
        return x_BNSH
    cos, sin = rotations
    # Halves, not neighbours: exports to DeepSeek's classes reorder the rows.
    first, second = x_BNSH.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(
        x_BNSH.dtype
    )


# --- attention ------------------------------------------------------------------------------------


def attend(
    q_BNSH: Tensor,
    k_BMUH: Tensor,
    v_BMUV: Tensor,
    scale: float,
    bias: Tensor,
    sinks_N: Tensor | None,
) -> Tensor:
    """softmax(scale * q k^T + bias; sinks) v in fp32 -> [B, N, S, V].

    A sink is one more score of a head, whose value is zero.
    """
    repeats = q_BNSH.shape[1] // k_BMUH.shape[1]
    # In fp32 throughout: this class is written for exactness, not for speed.
    k_BNUH, v_BNUV = (x.repeat_interleave(repeats, dim=1).float() for x in (k_BMUH, v_BMUV))
    scores_BNSU = scale * (q_BNSH.float() @ k_BNUH.transpose(2, 3)) + bias
    if sinks_N is None:
        weights_BNSU = scores_BNSU.softmax(dim=-1)
    else:
        sinks = sinks_N.float()[:, None, None].expand(*scores_BNSU.shape[:3], 1)
        # The sink takes its share of the softmax, and its value of zero adds nothing.
        weights_BNSU = torch.cat((scores_BNSU, sinks), dim=-1).softmax(dim=-1)[..., :-1]
    return (weights_BNSU @ v_BNUV).to(q_BNSH.dtype)


class GroupedQueryAttention(nn.Module):
    """N query heads share M key/value heads (Ainslie et al. 2023).

    Queries and keys may be normalised before they are rotated.
    """

    def __init__(self, config: MoePretrainConfig, layer: int) -> None:
        super().__init__()
        form = SimpleNamespace(**config.attention)
        self.layer = layer
        self.window = config.sliding_windows[layer]
        self.head_dim = form.head_dim
        self.qk_norm = form.qk_norm
        queries = form.num_attention_heads * form.head_dim
        keys = form.num_key_value_heads * form.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=form.bias != "none")
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=form.bias != "none")
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=form.bias != "none")
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=form.bias == "all")
        if form.qk_norm != "none":
            over_heads = form.qk_norm == "full"
            self.q_norm = RMSNorm(queries if over_heads else form.head_dim, config.norm["eps"])
            self.k_norm = RMSNorm(keys if over_heads else form.head_dim, config.norm["eps"])
        self.sinks = nn.Parameter(torch.zeros(form.num_attention_heads)) if form.sinks else None

    def forward(self, x_BSD: Tensor, where: Places, cache: Any) -> Tensor:
        """[B, S, D] -> [B, S, D]; adds new keys and values to transformers' ``cache``, if any."""
        q_BSX, k_BSX, v_BSX = self.q_proj(x_BSD), self.k_proj(x_BSD), self.v_proj(x_BSD)
        if self.qk_norm == "full":
            q_BSX, k_BSX = self.q_norm(q_BSX), self.k_norm(k_BSX)
        q_BNSH, k_BMSH, v_BMSH = (
            x.unflatten(2, (-1, self.head_dim)).transpose(1, 2) for x in (q_BSX, k_BSX, v_BSX)
        )
        if self.qk_norm == "head":
            q_BNSH, k_BMSH = self.q_norm(q_BNSH), self.k_norm(k_BMSH)
        k_BMUH, v_BMUH = rotated(k_BMSH, where.rotations), v_BMSH
        if cache is not None:
            k_BMUH, v_BMUH = cache.update(k_BMUH, v_BMUH, self.layer)
        scale = where.scale * self.head_dim**-0.5
        y_BNSH = attend(
            rotated(q_BNSH, where.rotations),
            k_BMUH,
            v_BMUH,
            scale,
            where.biases[self.window],
            self.sinks,
        )
        return self.o_proj(y_BNSH.transpose(1, 2).flatten(2))


class MultiHeadLatentAttention(nn.Module):
    """Keys and values of all heads come from one latent vector a token (DeepSeek-V2, section 2.1).

    Besides it, all heads share one rotated key (arXiv 2405.04434). The cache has the latent in the
    place of keys, and the rotated key in that of values. C is the latent's size, R the rotated
    key's.
    """

    def __init__(self, config: MoePretrainConfig, layer: int) -> None:
        super().__init__()
        form = SimpleNamespace(**config.attention)
        self.form = form
        self.layer = layer
        self.window = config.sliding_windows[layer]
        eps = config.norm["eps"]
        N = form.num_attention_heads
        head = form.qk_nope_head_dim + form.qk_rope_head_dim
        biased = form.bias == "all"
        if form.q_lora_rank is None:
            self.q_proj = nn.Linear(config.hidden_size, N * head, bias=False)
        else:
            self.q_a_proj = nn.Linear(config.hidden_size, form.q_lora_rank, bias=biased)
            self.q_a_norm = NORMS[form.latent_norm](form.q_lora_rank, eps=eps)
            self.q_b_proj = nn.Linear(form.q_lora_rank, N * head, bias=False)
        self.kv_a_proj = nn.Linear(
            config.hidden_size, form.kv_lora_rank + form.qk_rope_head_dim, bias=biased
        )
        self.kv_a_norm = NORMS[form.latent_norm](form.kv_lora_rank, eps=eps)
        self.kv_b_proj = nn.Linear(
            form.kv_lora_rank, N * (form.qk_nope_head_dim + form.v_head_dim), bias=False
        )
        self.o_proj = nn.Linear(N * form.v_head_dim, config.hidden_size, bias=biased)
        self.sinks = nn.Parameter(torch.zeros(N)) if form.sinks else None
        self.scale = head**-0.5

    def forward(self, x_BSD: Tensor, where: Places, cache: Any) -> Tensor:
        """[B, S, D] -> [B, S, D]; adds latents and rotated keys to the ``cache``, if any."""
        form = self.form
        q_BSX = (
            self.q_proj(x_BSD)
            if form.q_lora_rank is None
            else self.q_b_proj(self.q_a_norm(self.q_a_proj(x_BSD)))
        )
        q_BNSX = q_BSX.unflatten(2, (form.num_attention_heads, -1)).transpose(1, 2)
        q_BNSH, q_BNSR = q_BNSX.split((form.qk_nope_head_dim, form.qk_rope_head_dim), dim=-1)
        latent_BSC, key_BSR = self.kv_a_proj(x_BSD).split(
            (form.kv_lora_rank, form.qk_rope_head_dim), dim=-1
        )
        latent_B1UC = self.kv_a_norm(latent_BSC)[:, None]
        key_B1UR = rotated(key_BSR[:, None], where.rotations)
        if cache is not None:
            latent_B1UC, key_B1UR = cache.update(latent_B1UC, key_B1UR, self.layer)
        kv_BNUX = (
            self.kv_b_proj(latent_B1UC[:, 0])
            .unflatten(2, (form.num_attention_heads, -1))
            .transpose(1, 2)
        )
        k_BNUH, v_BNUV = kv_BNUX.split((form.qk_nope_head_dim, form.v_head_dim), dim=-1)
        q_BNSX = torch.cat((q_BNSH, rotated(q_BNSR, where.rotations)), dim=-1)
        # The rotated key is one for all heads.
        k_BNUX = torch.cat((k_BNUH, key_B1UR.expand(-1, form.num_attention_heads, -1, -1)), dim=-1)
        y_BNSV = attend(
            q_BNSX, k_BNUX, v_BNUV, where.scale * self.scale, where.biases[self.window], self.sinks
        )
        return self.o_proj(y_BNSV.transpose(1, 2).flatten(2))


ATTENTION: dict[str, type[nn.Module]] = {
    "gqa": GroupedQueryAttention,
    "mla": MultiHeadLatentAttention,
}
