"""DeepSpeed's native MoE layer, with router losses of our own.

Its ``l_aux`` is not used: it has another scale for k = 1, 2 and more, and for k <= 2 counts first choices only.
"""

from __future__ import annotations

import torch
from deepspeed.moe.layer import MoE
from deepspeed.moe.sharded_moe import TopKGate
from torch.nn import functional

from pretrain.config.schema import DeepSpeedMoE as DeepSpeedConfig
from pretrain.model.mlp import SwiGLU
from pretrain.model.moe.balance import router_statistics
from pretrain.model.moe.interface import RouterStatistics, RoutingRecord


class _ObservedGate(TopKGate):
    """DeepSpeed's gate, which also leaves behind what it decided: choices per expert and how many found room."""

    counts_E: torch.Tensor
    kept: torch.Tensor

    def forward(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        decision = super().forward(*args, **kwargs)
        # (l_aux, capacity, E, expert of each choice or -1 when dropped [K, T], slots, weights, choices per expert before drops)
        self.counts_E = decision[6].float()
        self.kept = (decision[3] >= 0).float().mean()
        return decision


class DeepSpeedMoE(MoE):
    """Capacity factors, drop or pad, noisy gates, residual experts (Rajbhandari et al. 2022). Interface of :class:`DroplessMoE`."""

    def __init__(self, config: DeepSpeedConfig, hidden_size: int, ep_size: int = 1, ep_rank: int = 0) -> None:
        super().__init__(
            hidden_size=hidden_size,
            expert=SwiGLU(hidden_size, config.moe_intermediate_size),
            num_experts=config.num_experts,
            ep_size=ep_size,
            k=config.top_k,
            capacity_factor=config.capacity_factor,
            eval_capacity_factor=config.eval_capacity_factor,
            min_capacity=config.min_capacity,
            use_residual=config.use_residual,
            noisy_gate_policy=config.noisy_gate_policy,
            drop_tokens=config.drop_tokens,
            use_rts=config.use_rts,
            top2_2nd_expert_sampling=config.top2_2nd_expert_sampling,
        )
        self.ep_rank = ep_rank
        self.top_k = config.top_k
        self.deepspeed_moe.gate.__class__ = _ObservedGate

    def forward(
        self, x_BSD: torch.Tensor, record: RoutingRecord | None = None, fractions_E: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, RouterStatistics]:
        """[B, S, D] -> [B, S, D] and the router's statistics.

        ``record`` is not needed here: a recomputation repeats the same kernels on the same numbers with the restored random state.
        """
        y_BSD, _, _ = super().forward(x_BSD)
        gate = self.deepspeed_moe.gate
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        logits_TE = functional.linear(x_TD.float(), gate.wg.weight.float())
        return y_BSD, router_statistics(logits_TE, gate.counts_E, self.top_k, 1.0 - gate.kept, fractions_E)
