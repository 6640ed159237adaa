"""Recomputing a block changes nothing: same bits, same load, same routing even where the
recomputation comes out a little different.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.model import decoder
from pretrain.model.config import Recomputation
from pretrain.model.decoder import DecoderLM, TrainOutput
from pretrain.model.moe.dropless import DroplessMoE
from pretrain.model.moe.router import TopKRouter
from pretrain.model.recomputation import KEPT
from tests.support.tiny_model import KINDS, RECOMPUTATIONS, random_tokens, tiny_model

B, S, K = 2, 16, 2
DENSE = "model.moe=null"
FORMS: tuple[Recomputation, ...] = ("selective", "full")


def loss_and_gradients(model: DecoderLM) -> tuple[TrainOutput, dict[str, torch.Tensor]]:
    output = model(random_tokens(B, S), random_tokens(B, S, seed=1), float(B * S))
    model.zero_grad()
    output.loss.backward()
    return output, {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize(
    "overrides",
    [
        (KINDS["dropless"],),
        (KINDS["deepspeed"],),
        (DENSE, "model.layer_pattern.kind=all_dense", "model.intermediate_size=48"),
    ],
    ids=["dropless", "deepspeed", "dense"],
)
@pytest.mark.parametrize("form", FORMS)
def test_loss_and_gradients_are_the_same_bits(
    form: Recomputation, overrides: tuple[str, ...]
) -> None:
    kept, kept_gradients = loss_and_gradients(tiny_model(*overrides))
    recomputed, gradients = loss_and_gradients(
        tiny_model(*overrides, activation_checkpointing=form)
    )
    assert torch.equal(kept.loss, recomputed.loss) and torch.equal(kept.nll, recomputed.nll)
    assert kept_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, kept_gradients[name]), name


RANDOM = "model.dropout={embedding: 0.1, attention: 0.2, residual: 0.2, expert: 0.2}"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("form", FORMS)
def test_what_is_drawn_is_drawn_again(form: Recomputation, precision: str) -> None:
    """Attention with dropout draws inside an operator: kept, it would shift all later draws."""
    runs = []
    for one in ("none", form):
        model = tiny_model(
            RANDOM, "model.moe.router.jitter=0.1", activation_checkpointing=one
        ).train()
        torch.manual_seed(3)
        runs.append(loss_and_gradients(model.bfloat16() if precision == "bf16" else model))
    (kept, kept_gradients), (recomputed, gradients) = runs
    assert torch.equal(kept.loss, recomputed.loss)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, kept_gradients[name]), name


class _Counted(TorchDispatchMode):
    """How often each operator runs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.name()] += 1
        return func(*args, **(kwargs or {}))


def operators_of(form: Recomputation, *overrides: str) -> Counter[str]:
    """Those of a forward and backward pass."""
    model = tiny_model(*overrides, activation_checkpointing=form).train()
    with _Counted() as counted:
        loss_and_gradients(model)
    return counted.calls


def test_selective_repeats_norms_and_activations_but_no_product_and_no_attention() -> None:
    none, selective, full = (operators_of(form) for form in RECOMPUTATIONS)
    fused = "aten::_scaled_dot_product_flash_attention_for_cpu"
    # Not bmm: of vectors, in which experts' outputs are summed, it is repeated.
    assert {"aten::mm", fused} <= KEPT
    for name in ("aten::mm", fused):
        assert none[name] == selective[name] < full[name], name
    for name in ("aten::silu", "aten::index_select"):
        assert none[name] < selective[name] <= full[name], name
    # Attention that draws random numbers is repeated with them.
    drawn = "model.dropout.attention=0.1"
    assert operators_of("selective", drawn)[fused] == operators_of("full", drawn)[fused]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_load_is_counted_once(kind: str, form: Recomputation) -> None:
    output, _ = loss_and_gradients(tiny_model(KINDS[kind], activation_checkpointing=form))
    assert output.router is not None
    assert output.router.counts_LE.sum(dim=1).tolist() == [B * S * K] * 2
    plain, _ = loss_and_gradients(tiny_model(KINDS[kind]))
    assert plain.router is not None and torch.equal(plain.router.counts_LE, output.router.counts_LE)


def with_close_choices(model: DecoderLM) -> DecoderLM:
    """Router weights so small that every choice is close to a tie."""
    for block in model.layers:
        assert isinstance(block.feed_forward, DroplessMoE)
        block.feed_forward.router.gate.weight.data.mul_(1e-8)
    return model


def disturb_recomputation(model: DecoderLM) -> None:
    """From its second call on, a router sees its input negated: the opposite of each of the close
    choices.
    """
    seen: set[int] = set()

    def negate_later(router: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        if id(router) in seen:
            return (-args[0], *args[1:])
        seen.add(id(router))
        return args

    for module in model.modules():
        if isinstance(module, TopKRouter):
            module.register_forward_pre_hook(negate_later)


def expert_gradients_with_disturbance(
    form: Recomputation = "full",
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Gradients of all experts without checkpointing, and with a disturbed recomputation."""
    kind = KINDS["dropless"].replace(
        "}", ", expert_kernel: grouped_mm}"
    )  # its shapes do not show how many rows an expert gets
    _, kept = loss_and_gradients(with_close_choices(tiny_model(kind)))
    model = with_close_choices(tiny_model(kind, activation_checkpointing=form))
    disturb_recomputation(model)
    _, recomputed = loss_and_gradients(model)
    return (
        {name: gradient for name, gradient in run.items() if "experts" in name}
        for run in (kept, recomputed)
    )


def test_a_recomputation_that_would_flip_the_routing_repeats_it() -> None:
    kept, recomputed = expert_gradients_with_disturbance()
    for name, gradient in recomputed.items():
        torch.testing.assert_close(gradient, kept[name], atol=1e-6, rtol=1e-4, msg=name)


def test_without_a_record_the_flipped_routing_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "RoutingRecord", lambda keeps_rows: None)
    kept, recomputed = expert_gradients_with_disturbance()
    largest = max(
        (gradient - kept[name]).abs().max().item() / kept[name].abs().max().item()
        for name, gradient in recomputed.items()
    )
    assert largest > 0.1
