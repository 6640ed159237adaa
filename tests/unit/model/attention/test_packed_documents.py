"""Kernels for packed documents agree with the definition, and ``auto`` chooses among them.

Their CUDA functions are replaced by their definitions: what is tested is what they are given.
"""

from __future__ import annotations

import importlib
import itertools
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from data_pipeline.loading.batch import Sample, to_batch
from pretrain.config.load import load_recipe
from pretrain.config.rules.sections import kernel_demands
from pretrain.core.accelerators import accelerator
from pretrain.core.errors import ConfigError
from pretrain.engine.build import with_kernel
from pretrain.model.attention.kernels import base, varlen
from pretrain.model.attention.kernels.base import AttentionKernel, chosen_kernel
from pretrain.model.attention.kernels.config import Flash, Varlen
from pretrain.model.attention.kernels.reference import reference_attention
from pretrain.model.attention.kernels.varlen import varlen_attention
from pretrain.model.attention.mask import AttentionMask
from pretrain.model.attention.scores import Scores
from pretrain.model.decoder import DecoderLM
from pretrain.run.estimate import Hardware
from pretrain.run.same_run import past_difference
from tests.support.flash_stand_ins import flash_package, varlen_attn
from tests.support.host_syncs import host_syncs
from tests.support.tiny_model import random_tensor, random_tokens, tiny_config

B, S = 2, 13
CPU = torch.device("cpu")
# Odd lengths, one token alone, and padding at the end, which is a document of its own.
DOCUMENTS = torch.tensor([[0] * 5 + [1] + [2] * 3 + [3] * 4, [0] * 2 + [1] * 11])
MODULE = "pretrain.model.attention.kernels.flash"


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> AttentionKernel:
    monkeypatch.setitem(sys.modules, "flash_attn", flash_package())
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    module = importlib.import_module(MODULE)
    monkeypatch.setattr(module, "check_place", lambda kernel, q: None)
    monkeypatch.delitem(sys.modules, MODULE)
    return module.flash_attention  # type: ignore[no-any-return]


@pytest.fixture
def torch_varlen(monkeypatch: pytest.MonkeyPatch) -> AttentionKernel:
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    monkeypatch.setattr(varlen, "check_place", lambda kernel, q: None)
    return varlen_attention


def computed(
    kernel: AttentionKernel, scores: Scores, heads: tuple[int, int], sizes: tuple[int, int]
) -> list[torch.Tensor]:
    """The output and the gradients of queries, keys and values."""
    num_queries = S - scores.mask.offset
    q = random_tensor(B, heads[0], num_queries, sizes[0], seed=1)
    k = random_tensor(B, heads[1], S, sizes[0], seed=2)
    v = random_tensor(B, heads[1], S, sizes[1], seed=3)
    output = kernel(q, k, v, scores)
    assert output.shape == (B, heads[0], num_queries, sizes[1])
    weights = random_tensor(*output.shape, seed=4).detach()
    return [output, *torch.autograd.grad((output * weights).sum(), (q, k, v))]


def largest_difference(
    kernel: AttentionKernel,
    mask: dict[str, Any],
    heads: tuple[int, int] = (4, 2),
    sizes: tuple[int, int] = (8, 8),
    **terms: Any,
) -> float:
    pairs = zip(
        *(
            computed(one, Scores(AttentionMask(**mask), 0.4, **terms), heads, sizes)
            for one in (kernel, reference_attention)
        ),
        strict=True,
    )
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


PACKED: list[dict[str, Any]] = [
    {"document_ids_BS": DOCUMENTS},
    {"document_ids_BS": DOCUMENTS, "max_documents": 6},
    {"document_ids_BS": DOCUMENTS, "max_documents": 16},
]


@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)])
def test_flash_equals_the_definition_inside_documents(
    flash: AttentionKernel, heads: tuple[int, int]
) -> None:
    slopes_N = torch.linspace(0.1, 0.7, heads[0])
    for mask, window, slopes in itertools.product(PACKED, (None, 1, 3, 20), (None, slopes_N)):
        terms = {"window": window, "slopes_N": slopes}
        assert largest_difference(flash, mask, heads, **terms) < 3e-6, (mask, window)
        # Cached keys: of the first documents no query is left.
        assert largest_difference(flash, mask | {"offset": 7}, heads, **terms) < 3e-6, window


@pytest.mark.parametrize("sizes", [(8, 8), (6, 6), (12, 8), (8, 20)])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)])
def test_varlen_equals_the_definition_inside_documents(
    torch_varlen: AttentionKernel, heads: tuple[int, int], sizes: tuple[int, int]
) -> None:
    for mask, window in itertools.product(PACKED, (None, 1, 3, 20)):
        assert largest_difference(torch_varlen, mask, heads, sizes, window=window) < 3e-6, window


def test_what_varlen_does_not_know_is_computed_by_sdpa(
    torch_varlen: AttentionKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", None)
    for terms in ({"sinks_N": torch.ones(4)}, {"slopes_N": torch.linspace(0.1, 0.7, 4)}):
        assert largest_difference(torch_varlen, PACKED[0], **terms) < 3e-6
    for mask in ({}, {"offset": 7}, PACKED[0] | {"offset": 7}):
        assert largest_difference(torch_varlen, mask) < 3e-6


def test_other_documents_another_window_or_scale_are_seen(
    flash: AttentionKernel, torch_varlen: AttentionKernel
) -> None:
    moved = DOCUMENTS.clone()
    moved[0, 5] = 0
    for kernel in (flash, torch_varlen):
        for change in (
            {"mask": AttentionMask(document_ids_BS=moved)},
            {"window": 2},
            {"scale": 0.5},
        ):

            def wrong(
                q: Any, k: Any, v: Any, scores: Scores, kernel: Any = kernel, change: Any = change
            ) -> Any:
                return kernel(q, k, v, replace(scores, **change))

            assert largest_difference(wrong, PACKED[0], window=3) > 1e-3


def test_places_are_computed_once_without_a_wait() -> None:
    mask = AttentionMask(document_ids_BS=DOCUMENTS, max_documents=8)
    with host_syncs() as found:
        packed = mask.packed(S)
    assert found == [] and mask.packed(S) is packed
    assert packed.keys_C.tolist() == [0, 5, 6, 9, 13, 15, 26, 26, 26]
    assert torch.equal(packed.queries_C, packed.keys_C)
    assert AttentionMask(7, DOCUMENTS, 8).packed(6).queries_C.tolist() == [
        *(0, 0, 0, 2, 6, 6, 12, 12, 12)
    ]
    # Without a count there is room for a document a token.
    assert len(AttentionMask(document_ids_BS=DOCUMENTS).packed(S).keys_C) == B * S + 1


def test_a_batch_counts_its_documents_up_to_a_power_of_two() -> None:
    inputs = random_tokens(B, S).numpy()
    batch = to_batch([Sample(x, x, ids.numpy()) for x, ids in zip(inputs, DOCUMENTS, strict=True)])
    assert batch.max_documents == 8 == batch.to("cpu").max_documents
    one = to_batch([Sample(x, x, x * 0) for x in inputs[:1]])
    assert one.max_documents == 1
    assert to_batch([Sample(x, x, None) for x in inputs]).max_documents is None


# --- which kernel auto is -------------------------------------------------------------------------

BF16 = "train.precision=bf16"
MASKED = "data.document_mask=true"
SINKS = "model.attention.sinks=true"
ALIBI = "model.position={kind: alibi}"
LATENT = (
    "model.attention={kind: mla, num_attention_heads: 4, kv_lora_rank: 512, qk_rope_head_dim: 64,"
    " qk_nope_head_dim: 16, v_head_dim: 16}"
)


@pytest.mark.parametrize(
    ("overrides", "device", "capability", "installed", "expected"),
    [
        ((BF16, MASKED), "cpu", None, True, "sdpa"),
        ((BF16,), "cuda", (9, 0), True, "sdpa"),
        ((BF16, MASKED), "cuda", (9, 0), True, "varlen"),
        ((BF16, MASKED), "cuda", (9, 0), False, "flex"),
        ((BF16, MASKED, LATENT), "cuda", (8, 0), True, "varlen"),
        ((BF16, MASKED, ALIBI), "cuda", (9, 0), True, "flash"),
        ((BF16, MASKED, "model.dropout.attention=0.1"), "cuda", (9, 0), True, "flash"),
        ((BF16, MASKED, "model.dropout.attention=0.1"), "cuda", (9, 0), False, "sdpa"),
        ((BF16, MASKED, SINKS), "cuda", (9, 0), True, "flex"),
        (("train.precision=fp32", MASKED), "cuda", (9, 0), True, "flex"),
        (("train.precision=fp16", MASKED), "cuda", (7, 5), True, "flex"),
        (("train.precision=fp16", MASKED), "cuda", (6, 0), True, "sdpa"),
        ((BF16, MASKED, "model.attention.kernel=reference"), "cuda", (9, 0), True, "reference"),
    ],
)
def test_auto_is_the_fastest_kernel_that_meets_all_demands(
    overrides: tuple[str, ...],
    device: str,
    capability: tuple[int, int] | None,
    installed: bool,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(base, "_is_installed", lambda module: installed)
    recipe = load_recipe("debug", list(overrides))
    asked = recipe.model.attention.kernel
    assert chosen_kernel(asked, kernel_demands(recipe), device, capability) == expected


def test_here_auto_is_sdpa_and_the_recipe_keeps_it_open() -> None:
    recipe = load_recipe("debug", [MASKED, "model.vocab_size=64"])
    assert recipe.model.attention.kernel == "auto"
    assert with_kernel(recipe, "cpu").attention.kernel == "sdpa"
    blocks = DecoderLM(recipe.model).layers
    assert all(block.attention.kernel is base.attention_kernel("sdpa", CPU) for block in blocks)


def test_kernels_of_cuda_are_refused_here_and_planned_for_other_gpus() -> None:
    for name in ("varlen", "flash"):
        with pytest.raises(ConfigError, match=rf"kernel={name} needs a GPU .* 8\.0 or more, but"):
            base.check_kernel_here(name)
        Hardware(accelerator("A100")).check_kernel(name)
    for name in ("auto", "sdpa", "flex"):
        base.check_kernel_here(name)
        Hardware(accelerator("MI300X")).check_kernel(name)
    with pytest.raises(ConfigError, match="capability 8.0 or more, and MI300X has another"):
        Hardware(accelerator("MI300X")).check_kernel("varlen")
    q = random_tensor(1, 2, S, 8)
    scores = Scores(AttentionMask(document_ids_BS=DOCUMENTS[:1]), 0.4)
    with pytest.raises(ConfigError, match="varlen takes fp16 or bf16 on CUDA, not torch.float32"):
        varlen_attention(q, q, q, scores)


def test_sections_state_what_the_functions_have_no_arguments_for() -> None:
    demands = kernel_demands(load_recipe("debug", [BF16, MASKED]))
    assert Flash.lacks(demands) == Varlen.lacks(demands) == []
    for change in ({"alibi": True}, {"dropout": True}, {"sinks": True}, {"fp32": True}):
        assert Varlen.lacks(replace(demands, **change)) == [*change]
    assert Varlen.lacks(replace(demands, widest_head=576)) == []
    assert Varlen.lacks(replace(demands, trained_head=264)) == ["heads_wider_than_256"]
    assert "sinks_with_document_masks" in Flash.lacks(replace(demands, sinks=True))


def test_a_run_of_another_kernel_continues() -> None:
    before = load_recipe("debug", ["model.attention.kernel=sdpa"])
    assert past_difference(load_recipe("debug"), before, 10) is None
    other = load_recipe("debug", ["model.attention.qk_norm=full"])
    assert "qk_norm" in str(past_difference(other, before, 10))
    assert tiny_config().attention.kernel == "auto"
