"""One dropless layer in bf16, and what a forward and backward pass of it read and write."""

from __future__ import annotations

import torch

from pretrain.model.moe.dropless import DroplessMoE
from tests.support.tiny_model import random_tensor, tiny_config
from tests.support.traffic import Traffic

T, K, E, F = 24, 3, 5, 56


def traffic_of_a_layer() -> Traffic:
    """In units of T * D, R * D and R * F elements, with R = T * K."""
    moe = f"{{kind: dropless, num_experts: {E}, top_k: {K}, moe_intermediate_size: {F}}}"
    config = tiny_config(f"model.moe={moe}")
    D = config.hidden_size
    layer = DroplessMoE(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    layer = layer.to(torch.bfloat16)
    x_BSD = random_tensor(2, T // 2, D, dtype=torch.bfloat16)
    gradient_BSD = random_tensor(2, T // 2, D, seed=1, dtype=torch.bfloat16).detach()
    units = {T * D: "TD", T * K * D: "RD", T * K * F: "RF"}
    with Traffic(units) as traffic:
        y_BSD, statistics = layer(x_BSD)
        torch.autograd.backward(
            [y_BSD, statistics.losses_J], [gradient_BSD, torch.ones_like(statistics.losses_J)]
        )
    assert y_BSD.dtype == torch.bfloat16 and x_BSD.grad is not None
    return traffic
