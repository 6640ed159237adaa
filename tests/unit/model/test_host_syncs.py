"""No forward or backward pass makes the host wait for a GPU, whatever the model consists of."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from pretrain.model.config import Recomputation
from tests.support.host_syncs import host_syncs
from tests.support.model_kinds import CASES
from tests.support.tiny_model import random_tokens, tiny_config, tiny_model

B, S = 2, 24
# What has to wait: the room of DeepSpeed's experts is a number, as is that of the rows of a PEER
# table that a step has used.
MAY_WAIT = {
    "deepspeed": {"_local_scalar_dense"},
    "peer": {"_local_scalar_dense", "unique_consecutive"},
}


def waits_of(*overrides: str, activation_checkpointing: Recomputation = "none") -> list[str]:
    """What waits in a forward and backward pass over packed documents, as on a GPU."""
    if getattr(tiny_config(*overrides).moe, "kind", "") == "dropless":
        overrides = (*overrides, "model.moe.expert_kernel=grouped_mm")
    model = tiny_model(*overrides, activation_checkpointing=activation_checkpointing).train()
    tokens = random_tokens(B, S + 1, seed=5)
    documents_BS = (torch.arange(S) // 7).expand(B, S)
    normalizer = torch.tensor(float(B * S))
    with host_syncs() as found:
        output = model(tokens[:, :-1], tokens[:, 1:], normalizer, documents_BS)
        output.loss.backward()
    return found


@pytest.mark.parametrize("case", CASES)
def test_no_kind_waits_in_a_forward_and_backward_pass(case: str) -> None:
    moe = tiny_config(*CASES[case]).moe
    may_wait = MAY_WAIT.get(moe.kind, set()) if moe is not None else set()
    assert set(waits_of(*CASES[case])) == may_wait


@pytest.mark.parametrize("recomputed", ["selective", "full"])
def test_recomputed_activations_do_not_wait_either(recomputed: Recomputation) -> None:
    assert waits_of(activation_checkpointing=recomputed) == []


@pytest.mark.parametrize(
    ("name", "wait"),
    [
        ("bincount", lambda x: torch.bincount(x.long())),
        ("nonzero", lambda x: x.nonzero()),
        ("index", lambda x: x[x > 0]),
        ("index_put_", lambda x: x.__setitem__(x > 0, torch.ones(2))),
        ("_local_scalar_dense", lambda x: bool(x.sum() > 0)),
        ("repeat_interleave", lambda x: torch.repeat_interleave(x.long())),
        ("tolist", lambda x: x.tolist()),
        ("cpu", lambda x: x.cpu()),
        ("masked_select", lambda x: x.masked_select(x > 0)),
    ],
)
def test_what_waits_is_seen(name: str, wait: Callable[[torch.Tensor], object]) -> None:
    with host_syncs() as found:
        wait(torch.tensor([0.0, 1.0, 2.0]))
    assert found[-1] == name


def test_what_waits_in_a_backward_pass_is_seen() -> None:
    class Waits(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            return x * 1

        @staticmethod
        def backward(ctx, gradient):  # type: ignore[no-untyped-def]
            return gradient * gradient.sum().item()

    x = torch.ones(3, requires_grad=True)
    with host_syncs() as found:
        Waits.apply(x).sum().backward()
    assert found == ["_local_scalar_dense"]
