"""Every attention kernel agrees with the definition, forward and backward, for every mask, head
grouping and term of the scores.
"""

from __future__ import annotations

import importlib
import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import flex_attention as torch_flex

from pretrain.config.load import load_recipe
from pretrain.core.errors import ConfigError
from pretrain.model.attention.kernels import base
from pretrain.model.attention.kernels.base import AttentionKernel, attention_kernel
from pretrain.model.attention.kernels.flex import flex_attention
from pretrain.model.attention.kernels.reference import reference_attention
from pretrain.model.attention.kernels.sdpa import sdpa_attention
from pretrain.model.attention.mask import AttentionMask
from pretrain.model.attention.scores import Scores
from pretrain.model.decoder import DecoderLM
from pretrain.model.sizes import model_size
from tests.support.flash_stand_ins import flash_package
from tests.support.tiny_model import random_tensor, tiny_config

B, M, S, H = 2, 2, 7, 8
CPU = torch.device("cpu")
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 2]])
# A fresh mask and its number of queries: the keys are always S.
MASKS: dict[str, Callable[[], tuple[AttentionMask, int]]] = {
    "causal": lambda: (AttentionMask(), S),
    "documents": lambda: (AttentionMask(document_ids_BS=DOCUMENTS), S),
    "one_query_after_cache": lambda: (AttentionMask(offset=6), 1),
    "chunk_after_cache": lambda: (AttentionMask(offset=4), 3),
}
# Key/value heads and query heads for each: multi-head, grouped, three to one, multi-query.
HEADS = {"mha": (2, 1), "gqa": (2, 2), "gqa_3": (1, 3), "mqa": (1, 4)}
WINDOWS = (None, 1, 3, 6, 7, 100)
TERMS = list(itertools.product(WINDOWS, (False, True), (False, True)))


@pytest.fixture
def flex_backward_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses this backward pass on a CPU for want of a fast one.

    Without the refusal it computes it, with every score in memory.
    """
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)


def slopes(num_heads: int) -> torch.Tensor:
    return torch.linspace(0.1, 0.7, num_heads)


def attention_and_gradients(
    kernel: AttentionKernel,
    scores: Scores,
    num_queries: int,
    heads: str = "gqa",
    dtype: torch.dtype = torch.float32,
    value_size: int = H,
) -> list[torch.Tensor]:
    """The output and the gradients of queries, keys, values and, where there are some, sinks."""
    num_kv, ratio = HEADS[heads]
    q = random_tensor(B, num_kv * ratio, num_queries, H, seed=1, dtype=dtype)
    k = random_tensor(B, num_kv, S, H, seed=2, dtype=dtype)
    v = random_tensor(B, num_kv, S, value_size, seed=3, dtype=dtype)
    output = kernel(q, k, v, scores)
    assert output.dtype == dtype and output.shape == (B, num_kv * ratio, num_queries, value_size)
    leaves = (q, k, v) if scores.sinks_N is None else (q, k, v, scores.sinks_N)
    weights = random_tensor(*output.shape, seed=4).detach()
    return [output, *torch.autograd.grad((output.float() * weights).sum(), leaves)]


def scores_of(
    mask: AttentionMask,
    heads: str,
    window: int | None,
    alibi: bool,
    sinks: bool,
    dtype: torch.dtype = torch.float32,
) -> Scores:
    num_heads = math.prod(HEADS[heads])
    return Scores(
        mask,
        H**-0.5,
        window,
        slopes(num_heads) if alibi else None,
        random_tensor(num_heads, seed=5, dtype=dtype) if sinks else None,
    )  # fmt: skip


def largest_difference(
    kernel: AttentionKernel,
    other: AttentionKernel,
    mask: str,
    heads: str,
    terms: tuple[int | None, bool, bool],
) -> float:
    results = []
    for one in (kernel, other):
        made, num_queries = MASKS[mask]()
        results.append(
            attention_and_gradients(one, scores_of(made, heads, *terms), num_queries, heads)
        )
    return max(float((a - b).detach().abs().max()) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("mask", MASKS)
def test_sdpa_equals_the_definition_with_gradients(mask: str, heads: str) -> None:
    for terms in TERMS:
        assert largest_difference(sdpa_attention, reference_attention, mask, heads, terms) < 2e-6, (
            terms
        )


@pytest.mark.usefixtures("flex_backward_on_cpu")
@pytest.mark.parametrize(
    ("mask", "heads"),
    [
        ("causal", "gqa"),
        ("documents", "gqa_3"),
        ("one_query_after_cache", "mqa"),
        ("chunk_after_cache", "mha"),
    ],
)
def test_flex_equals_the_definition_with_gradients(mask: str, heads: str) -> None:
    for terms in ((3, True, True), (None, False, False)):
        assert largest_difference(flex_attention, reference_attention, mask, heads, terms) < 3e-6, (
            terms
        )


@pytest.mark.parametrize("kernel", [sdpa_attention, flex_attention])
@torch.no_grad()
def test_bf16_is_the_definition_up_to_its_rounding(kernel: AttentionKernel) -> None:
    """Masks, biases and sinks in the dtype of the queries: torch refuses a bias in another."""
    for window, alibi, sinks in ((None, False, True), (3, True, False), (3, True, True)):
        outputs = []
        for one in (kernel, reference_attention):
            scores = scores_of(
                AttentionMask(document_ids_BS=DOCUMENTS),
                "gqa",
                window,
                alibi,
                sinks,
                torch.bfloat16,
            )
            q, k, v = (
                random_tensor(B, n, S, H, seed=seed, dtype=torch.bfloat16).detach()
                for seed, n in enumerate((4, 2, 2))
            )
            outputs.append(one(q, k, v, scores))
        torch.testing.assert_close(*outputs, atol=2e-2, rtol=2e-2)


def test_bf16_gradients_follow_the_definition() -> None:
    for terms in itertools.product((None, 3), (False, True), (False, True)):
        mine, expected = (
            attention_and_gradients(
                kernel,
                scores_of(AttentionMask(), "gqa", *terms, torch.bfloat16),
                S,
                dtype=torch.bfloat16,
            )
            for kernel in (sdpa_attention, reference_attention)
        )
        for one, other in zip(mine, expected, strict=True):
            torch.testing.assert_close(one, other, atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize("sinks", [False, True])
def test_values_may_be_narrower_or_wider_than_keys(sinks: bool) -> None:
    for value_size in (4, 8, 6, 12, 20):
        mine, expected = (
            attention_and_gradients(
                kernel,
                scores_of(AttentionMask(), "gqa", None, False, sinks),
                S,
                value_size=value_size,
            )
            for kernel in (sdpa_attention, reference_attention)
        )
        for one, other in zip(mine, expected, strict=True):
            torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-5)


# --- a kernel that gets one thing wrong is noticed --------------------------------------

WRONG: dict[str, Callable[[Scores], Scores]] = {
    "window_off_by_one": lambda scores: replace(scores, window=4),
    "no_window": lambda scores: replace(scores, window=None),
    "cache_off_by_one": lambda scores: replace(
        scores, mask=AttentionMask(offset=scores.mask.offset + 1)
    ),
    "inverted_alibi": lambda scores: replace(scores, slopes_N=-slopes(4)),
    "slopes_in_another_order": lambda scores: replace(scores, slopes_N=slopes(4).flip(0)),
    "no_sinks": lambda scores: replace(scores, sinks_N=None),
    "sinks_in_another_order": lambda scores: replace(scores, sinks_N=scores.sinks_N.flip(0)),
    "another_scale": lambda scores: replace(scores, scale=scores.scale * 1.1),
}


@pytest.mark.parametrize(
    ("kernel", "wrong"),
    [
        *itertools.product((sdpa_attention, reference_attention), WRONG),
        (flex_attention, "window_off_by_one"),
    ],
)
@torch.no_grad()
def test_a_wrong_term_is_told_apart(kernel: AttentionKernel, wrong: str) -> None:
    q, k, v = (
        random_tensor(*shape, H, seed=seed).detach()
        for seed, shape in enumerate(((B, 4, 3), (B, 2, S), (B, 2, S)))
    )
    right, broken = (
        scores_of(AttentionMask(offset=4), "gqa", 3, True, True),
        WRONG[wrong](scores_of(AttentionMask(offset=4), "gqa", 3, True, True)),
    )
    assert (kernel(q, k, v, right) - reference_attention(q, k, v, right)).abs().max() < 1e-6
    assert (kernel(q, k, v, broken) - reference_attention(q, k, v, right)).abs().max() > 1e-3


# --- the definition itself ------------------------------------------------------------------------


@torch.no_grad()
def test_reference_is_the_softmax_over_visible_keys_term_by_term() -> None:
    """Against loops over single numbers: scale, ALiBi, sinks, window and documents at once."""
    q, k, v = (
        random_tensor(B, 4, S, H, seed=1),
        random_tensor(B, 2, S, H, seed=2),
        random_tensor(B, 2, S, H, seed=3),
    )
    scores = scores_of(AttentionMask(document_ids_BS=DOCUMENTS), "gqa", 3, True, True)
    assert scores.sinks_N is not None
    output = reference_attention(q, k, v, scores)
    for b, head, query in itertools.product(range(B), range(4), range(S)):
        keys = [
            key
            for key in range(max(0, query - 2), query + 1)
            if DOCUMENTS[b, key] == DOCUMENTS[b, query]
        ]
        logits = [
            float(q[b, head, query] @ k[b, head // 2, key]) / math.sqrt(H)
            - float(slopes(4)[head]) * (query - key)
            for key in keys
        ]
        total = sum(map(math.exp, logits)) + math.exp(float(scores.sinks_N[head]))
        expected = sum(
            math.exp(logit) / total * v[b, head // 2, key]
            for logit, key in zip(logits, keys, strict=True)
        )
        torch.testing.assert_close(output[b, head, query], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 2])
def test_every_query_sees_itself_so_that_no_row_is_empty(window: int | None) -> None:
    alone = torch.arange(S).expand(B, S)  # each token a document of its own
    for mask in (AttentionMask(document_ids_BS=DOCUMENTS), AttentionMask(document_ids_BS=alone)):
        assert mask.dense(S, S, CPU, window).diagonal(dim1=-2, dim2=-1).all()
        for kernel in (reference_attention, sdpa_attention):
            for value in attention_and_gradients(
                kernel, scores_of(mask, "gqa", window, True, True), S
            ):
                assert value.isfinite().all()


@pytest.mark.parametrize("kernel", ["reference", "sdpa"])
@pytest.mark.parametrize("sinks", [False, True])
@torch.no_grad()
def test_dropout_zeroes_that_share_of_weights_and_keeps_their_mean(
    kernel: str, sinks: bool
) -> None:
    """One-hot values show the weights themselves.

    Both kernels draw from one distribution: the sink is not scaled up, the weights are.
    """
    size, rate, draws = 16, 0.25, 300
    torch.manual_seed(0)
    q, k = random_tensor(1, 1, size, size, seed=1), random_tensor(1, 1, size, size, seed=2)
    values = torch.eye(size)[None, None]
    kept = Scores(AttentionMask(), 0.25, sinks_N=torch.ones(1) if sinks else None)
    weights = reference_attention(q, k, values, kept)[0, 0]
    run = attention_kernel(kernel, CPU)
    drawn = torch.stack(
        [run(q, k, values, replace(kept, dropout=rate))[0, 0] for _ in range(draws)]
    )
    visible = torch.ones(size, size).tril().bool()
    survivors = drawn[:, visible]
    assert (survivors == 0).float().mean() == pytest.approx(rate, abs=0.01)
    expected = (weights / (1 - rate))[visible].expand(draws, -1)
    torch.testing.assert_close(
        survivors[survivors != 0], expected[survivors != 0], atol=1e-5, rtol=1e-4
    )


# --- how the work is shared and what is refused ---------------------------------------------------


def test_a_mask_is_built_once_a_forward_for_all_layers_that_ask_alike() -> None:
    mask = AttentionMask(document_ids_BS=DOCUMENTS)
    assert mask.dense(S, S, CPU, 3) is mask.dense(S, S, CPU, 3)
    assert mask.dense(S, S, CPU, 3) is not mask.dense(S, S, CPU, 2)
    assert AttentionMask() == AttentionMask() and AttentionMask().dense(
        S, S, CPU
    ) is not AttentionMask().dense(S, S, CPU)


@pytest.mark.parametrize("terms", [(None, False), (None, True), (7, False), (100, True)])
def test_sdpa_builds_no_mask_where_causality_is_all(terms: tuple[int | None, bool]) -> None:
    window, sinks = terms
    for mask, num_queries in (MASKS["causal"](), MASKS["one_query_after_cache"]()):
        attention_and_gradients(
            sdpa_attention, scores_of(mask, "gqa", window, False, sinks), num_queries
        )
        assert not mask._made
    cut = AttentionMask()
    attention_and_gradients(sdpa_attention, scores_of(cut, "gqa", 6, False, sinks), S)
    assert cut._made


def test_flex_generates_token_by_token_without_being_compiled_anew() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        for offset in range(12):
            q, k = (
                random_tensor(1, 2, 1, H, seed=offset).detach(),
                random_tensor(1, 1, offset + 1, H, seed=99).detach(),
            )
            scores = Scores(AttentionMask(offset), 0.3, 4, slopes(2), random_tensor(2))
            torch.testing.assert_close(
                flex_attention(q, k, k, scores),
                reference_attention(q, k, k, scores),
                atol=1e-6,
                rtol=1e-5,
            )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4


def test_flex_names_another_kernel_where_torch_has_no_backward_pass() -> None:
    with pytest.raises(
        ConfigError,
        match=(
            r"kernel=flex cannot run here \(.*backward on CPU.*\): use --set"
            r" model.attention.kernel=sdpa"
        ),
    ):
        attention_and_gradients(
            flex_attention, scores_of(AttentionMask(), "gqa", None, False, False), S
        )


def test_flash_without_its_package_is_refused_when_the_model_is_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tiny_config("model.attention.kernel=flash", "train.precision=bf16")
    with pytest.raises(ConfigError, match=r"kernel=flash needs a GPU .*, but there is no GPU"):
        DecoderLM(config)
    monkeypatch.setattr(base, "gpu_capability", lambda: (9, 0))
    with pytest.raises(
        ConfigError, match=r"model.attention.kernel=flash needs the package flash_attn.*kernel=sdpa"
    ):
        DecoderLM(config)
    assert model_size(config, 64).parameters_total > 0  # counting needs no kernel


def test_fp32_is_refused_to_flash() -> None:
    with pytest.raises(
        ConfigError, match="kernel=flash cannot compute fp32: use reference or sdpa or flex"
    ):
        load_recipe(
            "debug",
            ["model.attention.kernel=flash", "model.attention.sinks=true", "train.precision=fp32"],
        )


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> AttentionKernel:
    """Our kernel around the package's function, whose CUDA form no machine of these tests has."""
    monkeypatch.setitem(sys.modules, "flash_attn", flash_package())
    monkeypatch.delitem(sys.modules, "pretrain.model.attention.kernels.flash", raising=False)
    module = importlib.import_module("pretrain.model.attention.kernels.flash")
    monkeypatch.setattr(module, "check_place", lambda kernel, q: None)
    monkeypatch.delitem(sys.modules, "pretrain.model.attention.kernels.flash")
    return module.flash_attention  # type: ignore[no-any-return]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("mask", ["causal", "one_query_after_cache", "chunk_after_cache"])
def test_flash_with_sinks_equals_the_definition_with_gradients(
    flash: AttentionKernel, mask: str, heads: str
) -> None:
    everything = ((None, False, True), (None, False, False), (3, False, False), (6, True, False))
    for terms in everything:
        assert largest_difference(flash, reference_attention, mask, heads, terms) < 2e-6, terms
    # A window leaves the sinks' key out, which is why the section refuses both together.
    if mask == "causal":
        wrong = (3, False, True)
        assert largest_difference(flash, reference_attention, mask, heads, wrong) > 1e-3


@pytest.mark.parametrize(
    ("settings", "lacking"),
    [
        (("model.attention.sliding_window=4",), "sinks_with_a_window"),
        (("model.position={kind: alibi}",), "sinks_with_alibi"),
        (("model.attention.head_dim=256",), "heads_wider_than_248_with_sinks"),
        (("data.document_mask=true",), "sinks_with_document_masks"),
    ],
)
def test_flash_refuses_what_its_sinks_cannot_be_combined_with(
    settings: tuple[str, ...], lacking: str
) -> None:
    base = ["model.attention.kernel=flash", "train.precision=bf16", *settings]
    load_recipe("debug", base)
    with pytest.raises(ConfigError, match=f"kernel=flash cannot compute {lacking}: use"):
        load_recipe("debug", [*base, "model.attention.sinks=true"])


def test_project_828_s_attention_with_sinks_takes_torch_s_fused_kernel_without_a_mask(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def seen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        assert options["attn_mask"] is None and options["is_causal"]
        options.pop("attn_mask")
        chosen.append(torch._fused_sdp_choice(q, k, v, **options))
        return fused(q, k, v, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", seen)
    model = DecoderLM(load_recipe("p828_60m_mini", ["model.vocab_size=64"]).model)
    assert model.config.attention.sinks
    assert all(block.attention.kernel is sdpa_attention for block in model.layers)
    model.logits(torch.zeros(1, 16, dtype=torch.int64))
    # 1 is flash attention; 0 would be the plain form with every score in memory.
    assert chosen == [int(torch.nn.attention.SDPBackend.FLASH_ATTENTION)] * 2
