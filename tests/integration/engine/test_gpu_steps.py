"""A training step without a wait for the device; on a GPU torch itself refuses one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.support.host_syncs import host_syncs
from tests.support.tiny_model import random_tokens, tiny_model

B, S = 2, 24


def step_on(device: str, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    """A function that takes one step of a tiny MoE model and returns its loss."""
    model = tiny_model("model.moe.expert_kernel=grouped_mm").to(device, dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    tokens_BS = random_tokens(B, S + 1, seed=5).to(device)
    documents_BS = (torch.arange(S, device=device) // 7).expand(B, S)
    normalizer = torch.tensor(float(B * S), device=device)

    def step() -> torch.Tensor:
        loss: torch.Tensor = model(
            tokens_BS[:, :-1], tokens_BS[:, 1:], normalizer, documents_BS
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def test_a_step_waits_nowhere() -> None:
    step = step_on("cpu", torch.float32)
    before = step()
    with host_syncs() as found:
        after = step()
    assert found == []
    assert after < before


@pytest.mark.gpu
def test_a_step_on_a_gpu_waits_nowhere() -> None:
    # In fp32 torch's grouped product reads the experts' counts on the host.
    step = step_on("cuda", torch.bfloat16)
    # Kernels are compiled and workspaces allocated in the first step.
    before = step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        after = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert after.item() < before.item()


@pytest.mark.gpu
def test_a_gpu_trains_as_a_cpu_does() -> None:
    steps = [step_on(device, torch.float32) for device in ("cpu", "cuda")]
    losses = [[step().item() for _ in range(5)] for step in steps]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
