"""Runs forward and backward passes of a model whose experts are shared by all ranks.

A case has "name", "overrides", "run" (a function below), and optionally "dtype", "recomputed"
(activation checkpointing) and "one_expert" (all tokens choose the same).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from deepspeed import comm
from deepspeed.module_inject.auto_ep_layer import _AllToAllV
from torch import distributed

from pretrain.engine.topology import connect
from pretrain.model.decoder import DecoderLM
from pretrain.model.init import initialize
from pretrain.model.moe.dropless import DroplessMoE
from pretrain.model.moe.exchange import all_to_all, base, deduplicated, transfer
from pretrain.model.moe.exchange.transfer import Transfer
from tests.support import deep_ep_stand_in
from tests.support.host_syncs import host_syncs
from tests.support.rank_worker import forget_expert_groups
from tests.support.tiny_model import random_tokens, tiny_config

B, S = 2, 24


class Blocking(Transfer):
    """DeepSpeed's all-to-all, which returns when it is done: the reference."""

    def start(self, rows_RN: torch.Tensor) -> Transfer:
        self._target = _AllToAllV.apply(self._group, rows_RN, self.sent, self.received)
        return self

    def finish(self) -> torch.Tensor:
        assert self._target is not None
        return self._target


@contextmanager
def transfers_are(kind: type[Transfer]) -> Iterator[None]:
    with (
        mock.patch.object(all_to_all, "Transfer", kind),
        mock.patch.object(deduplicated, "Transfer", kind),
    ):
        yield


def make_model(case: dict[str, Any], ep_size: int, *overrides: str) -> DecoderLM:
    forget_expert_groups()
    connect(ep_size)
    part = distributed.get_rank() % ep_size
    config = tiny_config(*case["overrides"], *overrides, f"parallel.ep_size={ep_size}")
    recomputation = "full" if case.get("recomputed") else "none"
    model = DecoderLM(config, ep_size, part, activation_checkpointing=recomputation)
    initialize(model, 1)
    for layer in layers_of(model):
        layer.set_deepspeed_parallelism()
        if "one_expert" in case:
            with torch.no_grad():
                layer.router.gate.weight.zero_()
    return model.to(getattr(torch, case.get("dtype", "float32"))).train()


def layers_of(model: DecoderLM) -> list[DroplessMoE]:
    return [layer for layer in model.modules() if isinstance(layer, DroplessMoE)]


def passed(model: DecoderLM) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of this rank's own tokens, the balance losses included."""
    model.zero_grad()
    tokens = random_tokens(B, S + 1, seed=5 + distributed.get_rank())
    output = model(tokens[:, :-1], tokens[:, 1:], torch.tensor(float(B * S)), None)
    output.loss.backward()
    gradients = {name: value.grad for name, value in model.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    return output.loss.detach(), gradients


def spread(gradients: dict[str, torch.Tensor], ep_size: int) -> dict[str, torch.Tensor]:
    """What gradients of ranks with all experts are if ``ep_size`` neighbours share them."""
    first = distributed.get_rank() // ep_size * ep_size
    members = slice(first, first + ep_size)
    found = {}
    for name, gradient in gradients.items():
        if ".experts.w" in name:
            everyones = [torch.empty_like(gradient) for _ in range(distributed.get_world_size())]
            distributed.all_gather(everyones, gradient)
            whole = torch.stack([one.float() for one in everyones[members]]).sum(dim=0)
            gradient = whole.chunk(ep_size)[distributed.get_rank() % ep_size]
        elif name.endswith((".b1", ".b2", ".b3")):
            # Every rank has all biases, and gradients of those that it used.
            everyones = [torch.empty_like(gradient) for _ in range(distributed.get_world_size())]
            distributed.all_gather(everyones, gradient)
            whole = torch.stack([one.float() for one in everyones[members]]).sum(dim=0)
            rank, size = distributed.get_rank() % ep_size, len(gradient) // ep_size
            gradient = torch.zeros_like(whole)
            gradient[rank * size : (rank + 1) * size] = whole[rank * size : (rank + 1) * size]
        found[name] = gradient
    return found


def differences(found: Any, expected: Any) -> tuple[float, float]:
    """Of the losses, and the largest of a gradient relative to its norm, over all ranks."""
    loss = (found[0] - expected[0]).abs().item() / expected[0].abs().item()
    gradients = [
        (found[1][name].float() - value.float()).norm().item() / (value.float().norm().item() or 1)
        for name, value in expected[1].items()
    ]
    worst = torch.tensor([loss, max(gradients)])
    distributed.all_reduce(worst, op=distributed.ReduceOp.MAX)
    return tuple(worst.tolist())  # type: ignore[return-value]


def against_one_rank(case: dict[str, Any]) -> dict[str, Any]:
    """Both forms, and one whose weights are lost, compared with ranks that have all experts."""
    ep_size = case["ep_size"]
    loss, gradients = passed(make_model(case, 1))
    expected = loss, spread(gradients, ep_size)
    results = {}
    for name, joined in (("rows", "false"), ("joined", "true")):
        model = make_model(case, ep_size, f"model.moe.deduplicate={joined}")
        results[name] = differences(passed(model), expected)
    summed = deduplicated.sum_rows
    with mock.patch.object(deduplicated, "sum_rows", lambda rows, to, _=None: summed(rows, to)):
        model = make_model(case, ep_size, "model.moe.deduplicate=true")
        results["without_weights"] = differences(passed(model), expected)
    return results


def against_blocking(case: dict[str, Any]) -> dict[str, Any]:
    """Whether the overlapped form has the same bits as DeepSpeed's blocking all-to-all."""
    model = make_model(case, case["ep_size"])
    overlapped = passed(model)
    overlapped = overlapped[0], {name: value.clone() for name, value in overlapped[1].items()}
    with transfers_are(Blocking):
        blocking = passed(model)
    equal = [torch.equal(overlapped[0], blocking[0])]
    equal += [torch.equal(overlapped[1][name], value) for name, value in blocking[1].items()]
    return {"equal": all(equal), "loss": overlapped[0].item().hex(), "compared": len(equal)}


def waits(case: dict[str, Any]) -> dict[str, Any]:
    """What makes the host wait in a forward pass, and in its backward pass."""
    model = make_model(case, case["ep_size"])
    tokens = random_tokens(B, S + 1, seed=distributed.get_rank())
    with host_syncs() as found:
        output = model(tokens[:, :-1], tokens[:, 1:], torch.tensor(float(B * S)), None)
        forward = list(found)
        output.loss.backward()
    return {"forward": forward, "backward": found[len(forward) :], "layers": len(layers_of(model))}


def order(case: dict[str, Any]) -> dict[str, Any]:
    """When rows leave, are waited for, and when the shared experts compute, in one layer."""
    model = make_model(case, case["ep_size"])
    layer = layers_of(model)[0]
    events: list[str] = []
    x = torch.randn(B, S, model.config.hidden_size, requires_grad=True)

    class Watched(Transfer):
        def launch(self, rows_RN: torch.Tensor, *, backward: bool) -> torch.Tensor:
            events.append(f"launch {rows_RN.shape[1]}")
            self._width = rows_RN.shape[1]
            return super().launch(rows_RN, backward=backward)

        def wait(self) -> None:
            events.append(f"wait {self._width}")
            super().wait()

    shared = layer.shared.feed_forward
    shared.register_forward_hook(lambda *_: events.append("shared"))
    shared.register_full_backward_hook(lambda *_: events.append("shared"))
    with transfers_are(Watched):
        y, _ = layer(x)
        forward = list(events)
        y.sum().backward()
    return {"forward": forward, "backward": events[len(forward) :]}


class SentAway:
    """DeepSpeed's all-to-all, which counts what goes to other ranks."""

    def __init__(self, hidden_size: int) -> None:
        self.hidden_size = hidden_size
        self.rows = self.bytes = 0
        self._send = comm.all_to_all_single

    def __call__(self, output: Any, rows: Any, group: Any, **terms: Any) -> Any:
        splits = terms.get("input_split_sizes")
        here, size = distributed.get_rank(group), distributed.get_world_size(group)
        kept = len(rows) // size if splits is None else splits[here]
        elements = rows[0].numel()
        self.rows += (len(rows) - kept) * (elements == self.hidden_size)
        self.bytes += (len(rows) - kept) * elements * rows.element_size()
        return self._send(output, rows, group=group, **terms)


def rows_sent(case: dict[str, Any]) -> dict[str, Any]:
    """Rows and bytes that leave this rank in a forward pass of one layer, with and without."""
    x = torch.randn(1, 256, 256, generator=torch.Generator().manual_seed(3))
    results = {}
    for name, joined in (("rows", "false"), ("joined", "true")):
        layer = layers_of(make_model(case, case["ep_size"], f"model.moe.deduplicate={joined}"))[0]
        counter = SentAway(layer.hidden_size)
        with mock.patch.object(transfer.comm, "all_to_all_single", counter), torch.no_grad():
            layer(x.to(layer.experts.w1.dtype))
        results[name] = {"rows": counter.rows, "bytes": counter.bytes}
    return results


def through_deep_ep(case: dict[str, Any]) -> dict[str, Any]:
    """The exchange deepep with a stand-in for its package, compared with all_to_all."""
    deep_ep_stand_in.install()
    joined = passed(make_model(case, case["ep_size"], "model.moe.deduplicate=true"))
    with mock.patch.object(base, "gpu_capability", lambda: (9, 0)):
        model = make_model(case, case["ep_size"], "model.moe.exchange=deepep")
    found = passed(model)
    calls = dict(deep_ep_stand_in.ElasticBuffer.calls)
    deep_ep_stand_in.ElasticBuffer.calls.clear()
    for layer in layers_of(model):
        layer._deepep_exchange.release()
    return {
        "differences": differences(found, joined),
        "calls": calls,
        "destroyed": deep_ep_stand_in.ElasticBuffer.calls.pop("destroyed", 0),
    }


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    return {"name": case["name"], **globals()[case["run"]](case)}
