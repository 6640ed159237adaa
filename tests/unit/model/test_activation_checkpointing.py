"""Recomputing a block changes nothing: same bits, same load, same routing even where the
recomputation comes out a little different.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pretrain.model import decoder
from pretrain.model.decoder import DecoderLM, TrainOutput
from pretrain.model.moe.dropless import DroplessMoE
from pretrain.model.moe.router import TopKRouter
from tests.support.tiny_model import KINDS, random_tokens, tiny_model

B, S, K = 2, 16, 2
DENSE = "model.moe=null"


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
def test_loss_and_gradients_are_the_same_bits(overrides: tuple[str, ...]) -> None:
    kept, kept_gradients = loss_and_gradients(tiny_model(*overrides))
    recomputed, gradients = loss_and_gradients(
        tiny_model(*overrides, activation_checkpointing=True)
    )
    assert torch.equal(kept.loss, recomputed.loss) and torch.equal(kept.nll, recomputed.nll)
    assert kept_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, kept_gradients[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_load_is_counted_once(kind: str) -> None:
    output, _ = loss_and_gradients(tiny_model(KINDS[kind], activation_checkpointing=True))
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


def expert_gradients_with_disturbance() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Gradients of all experts without checkpointing, and with a disturbed recomputation."""
    kind = KINDS["dropless"].replace(
        "}", ", expert_kernel: grouped_mm}"
    )  # its shapes do not show how many rows an expert gets
    _, kept = loss_and_gradients(with_close_choices(tiny_model(kind)))
    model = with_close_choices(tiny_model(kind, activation_checkpointing=True))
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
    monkeypatch.setattr(decoder, "RoutingRecord", lambda: None)
    kept, recomputed = expert_gradients_with_disturbance()
    largest = max(
        (gradient - kept[name]).abs().max().item() / kept[name].abs().max().item()
        for name, gradient in recomputed.items()
    )
    assert largest > 0.1
