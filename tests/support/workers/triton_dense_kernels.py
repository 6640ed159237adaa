"""Fused rotation, loss and routing against the plain code; run by test_dense_kernels in a process
of its own.

Where there is no CUDA, Triton's interpreter computes them, and that has to be decided before
anything imports Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.library import opcheck

from pretrain.model.kernels import loss_triton, rope_triton, router_triton
from pretrain.model.kernels.selection import Mode, set_fused_kernels
from pretrain.model.loss import IGNORED_LABEL, LanguageModelHead, plain_chunk_losses
from pretrain.model.moe.base import RoutingRecord
from pretrain.model.moe.router import TopKRouter
from pretrain.model.moe.routers import ExpertGroups, NoisyTopK, SigmoidTopK, SoftmaxTopK
from pretrain.model.moe.routers.interface import Router
from pretrain.model.positions.rope import apply_rope, inverse_frequencies, rope_tables
from tests.support.tiny_model import random_tokens, tiny_model

DEVICE: str
FUSED: Mode
DEVICE, FUSED = ("cuda", "auto") if torch.cuda.is_available() else ("cpu", "always")
# Triton's interpreter cuts the bits that a bf16 value does not have, where a GPU rounds.
TOLERANCE = {
    torch.float32: {"rtol": 2e-6, "atol": 2e-6},
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-5},
    torch.float16: {"rtol": 2**-10, "atol": 1e-6},
}
DTYPES = list(TOLERANCE)


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    set_fused_kernels("auto")


def both(compute: Callable[[], Any]) -> tuple[Any, Any]:
    """The result of the fused kernels, and that of the plain code."""
    set_fused_kernels(FUSED)
    fused = compute()
    set_fused_kernels("none")
    return fused, compute()


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


# Rotation.
HEADS = {
    "B, N, S, H, R all odd or small": (2, 3, 5, 6, 6),
    "one token": (1, 2, 1, 10, 10),
    "a part of each head": (2, 3, 5, 80, 10),
    "one shared key of a wide row": (2, 1, 7, 576, 64),
    "as wide as usual": (1, 2, 3, 128, 128),
}


def rotated(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, per_sequence: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    B, N, S, H, R = shape
    positions = torch.arange(S) * 100 if not per_sequence else torch.arange(B * S).view(B, S) % 11
    tables = rope_tables(
        positions.to(DEVICE), inverse_frequencies(R, 10000.0, torch.device(DEVICE)), 1.1
    )
    leaf_BSNH = normal(B, S, N, H, dtype=dtype).requires_grad_()
    y_BNSH = apply_rope(leaf_BSNH.transpose(1, 2), tables)
    y_BNSH.backward(normal(B, N, S, H, seed=1, dtype=dtype))
    assert leaf_BSNH.grad is not None
    return y_BNSH.detach(), leaf_BSNH.grad


@pytest.mark.parametrize("per_sequence", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", HEADS)
def test_rotations_and_gradients_equal_the_plain_ones(
    case: str, dtype: torch.dtype, per_sequence: bool
) -> None:
    fused, plain = both(lambda: rotated(HEADS[case], dtype, per_sequence))
    for one, other in zip(fused, plain, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other, **TOLERANCE[dtype])


def test_a_rotation_leaves_its_input_and_the_gradient_as_they_are() -> None:
    set_fused_kernels(FUSED)
    x_BNSH, gradient = normal(1, 2, 3, 4), normal(1, 1, 1, 1).expand(1, 2, 3, 4)
    tables = normal(3, 2, seed=1), normal(3, 2, seed=2)
    leaf = x_BNSH.clone().requires_grad_()
    apply_rope(leaf, tables).backward(gradient)
    assert torch.equal(leaf.detach(), x_BNSH)
    assert torch.equal(gradient, normal(1, 1, 1, 1).expand(1, 2, 3, 4))


def test_a_rotation_the_other_way_is_noticed() -> None:
    x_BNSH, tables = normal(1, 2, 3, 4), (normal(3, 2, seed=1), normal(3, 2, seed=2))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            rope_triton.rope(x_BNSH, *tables, True), apply_rope(x_BNSH, tables)
        )


# Loss.
def some_labels(C: int, V: int, ignored: str) -> torch.Tensor:
    labels_C = torch.randint(0, V, (C,), generator=torch.Generator().manual_seed(3))
    if ignored != "none":
        labels_C[:: 2 if ignored == "some" else 1] = IGNORED_LABEL
    return labels_C.to(DEVICE)


def chunk_losses(
    logits_CV: torch.Tensor, labels_C: torch.Tensor, z_loss_weight: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits_CV = logits_CV.clone()
    nll_C, loss_C = loss_triton.chunk_losses_(logits_CV, labels_C, z_loss_weight, IGNORED_LABEL)
    return nll_C.sum(), loss_C.sum(), logits_CV


def assert_same_losses(
    logits_CV: torch.Tensor, labels_C: torch.Tensor, z_loss_weight: float
) -> None:
    fused = chunk_losses(logits_CV, labels_C, z_loss_weight)
    plain = plain_chunk_losses(logits_CV.clone(), labels_C, z_loss_weight)
    for one, other in zip(fused[:2], plain[:2], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    assert fused[2].dtype == logits_CV.dtype
    torch.testing.assert_close(fused[2], plain[2].to(logits_CV.dtype), **TOLERANCE[logits_CV.dtype])


@pytest.mark.parametrize("ignored", ["none", "some", "all"])
@pytest.mark.parametrize("z_loss_weight", [0.0, 0.01])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [1, 50, 64, 8193])
def test_losses_and_gradients_equal_the_plain_ones(
    V: int, dtype: torch.dtype, z_loss_weight: float, ignored: str
) -> None:
    assert_same_losses(normal(5, V, dtype=dtype) * 3, some_labels(5, V, ignored), z_loss_weight)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_losses_of_a_large_vocabulary_equal_the_plain_ones(dtype: torch.dtype) -> None:
    assert_same_losses(normal(3, 131072, dtype=dtype) * 2, some_labels(3, 131072, "none"), 1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_of_extreme_logits_equal_the_plain_ones(dtype: torch.dtype) -> None:
    logits_CV = normal(4, 10, dtype=dtype)
    logits_CV[0, 3], logits_CV[1, 3], logits_CV[2] = 1e4, -1e4, 1e4
    labels_C = torch.tensor([3, 3, 0, 1], device=DEVICE)
    assert_same_losses(logits_CV, labels_C, 0.0)
    labels_C[0] = 4
    assert_same_losses(logits_CV, labels_C, 0.0)


def test_a_z_loss_of_another_weight_is_noticed() -> None:
    logits_CV, labels_C = normal(4, 10), some_labels(4, 10, "none")
    fused = chunk_losses(logits_CV, labels_C, 0.0101)[2]
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            fused, plain_chunk_losses(logits_CV.clone(), labels_C, 0.01)[2], rtol=2e-6, atol=2e-6
        )


def head_results(dtype: torch.dtype, has_bias: bool) -> dict[str, torch.Tensor]:
    """Loss, nll and all gradients of a head with padding rows and ignored labels, in chunks."""
    head = LanguageModelHead(
        16,
        padded_vocab_size=64,
        vocab_size=50,
        chunk_tokens=8,
        z_loss_weight=0.01,
        has_bias=has_bias,
    )
    head.weight.data = normal(64, 16, seed=1)
    head.to(DEVICE, dtype)
    x_BSE = normal(1, 37, 16, dtype=dtype).requires_grad_()
    loss, nll = head(x_BSE, some_labels(37, 50, "some")[None])
    (loss * 0.7).backward()
    leaves = {"x": x_BSE} | dict(head.named_parameters())
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    assert gradients.keys() == leaves.keys()
    return {"loss": loss.detach(), "nll": nll} | gradients


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_a_head_has_the_plain_codes_gradients(dtype: torch.dtype, has_bias: bool) -> None:
    fused, plain = both(lambda: head_results(dtype, has_bias))
    for name in plain:
        assert fused[name].dtype == plain[name].dtype
        distance = (fused[name].float() - plain[name].float()).norm()
        limit = 2e-6 if dtype == torch.float32 or plain[name].dim() == 0 else 0.01
        assert distance <= limit * plain[name].float().norm(), name
    assert fused["weight"][50:].count_nonzero() == 0


# Routing.
KINDS: dict[str, Router] = {
    "softmax": SoftmaxTopK(),
    "plain softmax": SoftmaxTopK(norm_topk_prob=False, routed_scaling_factor=2.5),
    "warm softmax": SoftmaxTopK(temperature=1.7),
    "sigmoid": SigmoidTopK(kind="sigmoid_topk", routed_scaling_factor=1.5),
    "plain sigmoid": SigmoidTopK(kind="sigmoid_topk", norm_topk_prob=False),
}


def router_of(kind: Router, E: int, K: int, balanced: bool) -> TopKRouter:
    router = TopKRouter(kind, nn.Linear(12, E, bias=False), K, balanced)
    router.gate.weight.data = normal(E, 12, seed=4).cpu()
    if router.balance_bias is not None:
        router.balance_bias += normal(E, seed=5).cpu() * 0.1
    return router.to(DEVICE)


def routed(
    kind: Router, E: int, K: int, balanced: bool, record: RoutingRecord | None = None
) -> dict[str, torch.Tensor]:
    """A decision, its statistics and the gradient of a mixture of all of them."""
    router = router_of(kind, E, K, balanced)
    x_TD = normal(21, 12, seed=6).requires_grad_()
    routing = router(x_TD, record)
    logsumexp_T, entropy_T = routing.logsumexp_T, routing.entropy_T
    if logsumexp_T is None:
        probs_TE = routing.probs_TE.detach()
        logsumexp_T = routing.logits_TE.logsumexp(dim=-1)
        entropy_T = -torch.special.xlogy(probs_TE, probs_TE).sum(dim=-1)
    total = (
        (routing.topk_weights_TK * normal(21, K, seed=7)).sum()
        + (routing.probs_TE * normal(21, E, seed=8)).sum()
        + 0.1 * logsumexp_T.square().sum()
    )
    gradients = torch.autograd.grad(total, (x_TD, router.gate.weight))
    assert not entropy_T.requires_grad
    return {
        "ids": routing.topk_ids_TK,
        "weights": routing.topk_weights_TK.detach(),
        "probabilities": routing.probs_TE.detach(),
        "logsumexp": logsumexp_T.detach(),
        "entropy": entropy_T,
        "x": gradients[0],
        "gate": gradients[1],
    }


def assert_same_routing(fused: dict[str, torch.Tensor], plain: dict[str, torch.Tensor]) -> None:
    assert torch.equal(fused["ids"], plain["ids"])
    for name in plain:
        torch.testing.assert_close(fused[name], plain[name], rtol=2e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize(
    ("E", "K"), [(8, 1), (8, 2), (8, 8), (10, 3), (33, 5), (64, 6), (200, 7), (256, 8)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_decisions_and_gradients_equal_the_plain_ones(
    kind: str, E: int, K: int, balanced: bool
) -> None:
    fused, plain = both(lambda: routed(KINDS[kind], E, K, balanced))
    assert_same_routing(fused, plain)


def test_a_recorded_choice_is_repeated() -> None:
    ids_TK = torch.stack([torch.randperm(10)[:3] for _ in range(21)]).to(DEVICE)
    fused, plain = both(lambda: routed(KINDS["softmax"], 10, 3, False, RoutingRecord(ids_TK)))
    assert torch.equal(fused["ids"], ids_TK)
    assert_same_routing(fused, plain)
    record = RoutingRecord()
    set_fused_kernels(FUSED)
    assert torch.equal(routed(KINDS["softmax"], 10, 3, False, record)["ids"], record.topk_ids_TK)


def test_kinds_without_a_kernel_compute_as_before() -> None:
    class Squared(SoftmaxTopK):
        def scores(self, logits_TE: torch.Tensor) -> torch.Tensor:
            return super().scores(logits_TE) ** 2

    groups = ExpertGroups(num_groups=4, top_k_groups=2, score="max")
    for kind in (Squared(), SoftmaxTopK(groups=groups)):
        fused, plain = both(lambda kind=kind: routed(kind, 8, 2, False))
        assert all(torch.equal(fused[name], plain[name]) for name in plain)


def test_noise_is_added_before_the_kernel() -> None:
    def noisy(training: bool) -> torch.Tensor:
        torch.manual_seed(0)
        router = router_of(NoisyTopK(kind="noisy_topk"), 8, 2, False).train(training)
        weights: torch.Tensor = router(normal(21, 12, seed=6)).topk_weights_TK
        return weights.detach()

    fused, plain = both(lambda: noisy(True))
    torch.testing.assert_close(fused, plain, rtol=2e-5, atol=1e-5)
    assert not torch.allclose(fused, noisy(False), atol=1e-3)


def fused_route(logits_TE: torch.Tensor, top_k: int) -> tuple[torch.Tensor, ...]:
    return router_triton.route(logits_TE, None, None, top_k, False, 1.0, True, 1.0)


def test_of_equal_scores_the_lowest_index_comes_first() -> None:
    assert fused_route(torch.zeros(3, 10, device=DEVICE), 4)[1].tolist() == [[0, 1, 2, 3]] * 3
    logits_TE = torch.tensor([[0.0, 2.0, 1.0, 2.0, 0.0]], device=DEVICE)
    assert fused_route(logits_TE, 4)[1].tolist() == [[1, 3, 2, 0]]


def test_extreme_and_undefined_logits_choose_experts_that_exist() -> None:
    logits_TE = torch.tensor(
        [[1e4, -1e4, 0.0, 1e4, 0.0], [float("nan")] * 5, [-1e4] * 5], device=DEVICE
    )
    probs_TE, ids_TK, weights_TK, logsumexp_T, entropy_T = fused_route(logits_TE, 3)
    assert ids_TK.tolist() == [[0, 3, 1], [0, 1, 2], [0, 1, 2]]
    assert torch.equal(probs_TE[0], torch.tensor([0.5, 0, 0, 0.5, 0], device=DEVICE))
    assert weights_TK[1].isnan().all() and logsumexp_T[1].isnan() and entropy_T[1].isnan()
    torch.testing.assert_close(
        logsumexp_T[[0, 2]], logits_TE[[0, 2]].logsumexp(dim=-1), rtol=1e-6, atol=0
    )
    sigmoid = router_triton.route(logits_TE, None, None, 3, True, 1.0, True, 1.0)
    assert torch.equal(sigmoid[0][0], torch.tensor([1 / 3, 0, 1 / 6, 1 / 3, 1 / 6], device=DEVICE))
    # All scores are 0: the bound of the sum keeps them from being undefined.
    assert sigmoid[0][2].count_nonzero() == 0 and sigmoid[2][2].count_nonzero() == 0


# The operators.
def test_operators_have_correct_schemas_fake_results_and_gradients() -> None:
    x_BNSH, table = normal(2, 3, 5, 8).requires_grad_(), normal(5, 3)
    opcheck(rope_triton.rope, (x_BNSH, table, table, False))
    logits = normal(4, 10)
    opcheck(loss_triton.chunk_losses_, (logits, some_labels(4, 10, "some"), 0.1, IGNORED_LABEL))
    leaf = normal(6, 10).requires_grad_()
    opcheck(router_triton.route, (leaf, normal(10), None, 3, False, 1.0, True, 1.0))


def test_compiled_code_is_one_graph() -> None:
    set_fused_kernels(FUSED)
    tables, x_BNSH = (normal(3, 2, seed=1), normal(3, 2, seed=2)), normal(1, 2, 3, 4)
    compiled = torch.compile(apply_rope, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x_BNSH, tables), apply_rope(x_BNSH, tables))
    router, x_TD = router_of(KINDS["softmax"], 8, 2, True), normal(21, 12, seed=6)
    found = torch.compile(router, backend="aot_eager", fullgraph=True)(x_TD)
    assert torch.equal(found.topk_weights_TK, router(x_TD).topk_weights_TK)


def model_gradients(overrides: tuple[str, ...]) -> dict[str, torch.Tensor]:
    model = tiny_model(*overrides).to(DEVICE).train()
    tokens = random_tokens(2, 13, seed=5).to(DEVICE)
    output = model(tokens[:, :-1], tokens[:, 1:], torch.tensor(24.0, device=DEVICE))
    output.loss.backward()
    gradients = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return {"loss": output.loss.detach()} | gradients


MLA = (
    "model.attention={kind: mla, num_attention_heads: 4, kv_lora_rank: 8, qk_nope_head_dim: 6,"
    " qk_rope_head_dim: 4, v_head_dim: 5}"
)


def assert_same_model(overrides: tuple[str, ...]) -> None:
    fused, plain = both(lambda: model_gradients(overrides))
    assert fused.keys() == plain.keys()
    for name in plain:
        torch.testing.assert_close(fused[name], plain[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("overrides", [(), (MLA, "model.output_z_loss_weight=0.001")])
def test_a_model_has_the_plain_codes_loss_and_gradients(overrides: tuple[str, ...]) -> None:
    assert_same_model(overrides)


def rotating_backwards(*inputs: Any) -> torch.Tensor:
    return ROPE(*inputs[:3], not inputs[3])


def with_other_weights(*inputs: Any) -> tuple[torch.Tensor, ...]:
    return ROUTE(*inputs[:-1], 1.01 * inputs[-1])


def with_more_z_loss(*inputs: Any) -> tuple[torch.Tensor, ...]:
    return LOSSES(*inputs[:2], inputs[2] + 0.01, inputs[3])


ROPE, ROUTE, LOSSES = rope_triton.rope, router_triton.route, loss_triton.chunk_losses_


@pytest.mark.parametrize(
    ("module", "name", "broken"),
    [
        (rope_triton, "rope", rotating_backwards),
        (router_triton, "route", with_other_weights),
        (loss_triton, "chunk_losses_", with_more_z_loss),
    ],
)
def test_a_model_with_a_wrong_kernel_is_noticed(
    module: ModuleType, name: str, broken: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, broken)
    with pytest.raises(AssertionError):
        assert_same_model(())
