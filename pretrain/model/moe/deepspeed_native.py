"""DeepSpeed's native MoE layer, with its own gate or with any router of ours, and with router
losses of our own.

Its ``l_aux`` is not used: it has another scale for k = 1, 2 and more, and for k <= 2 counts first
choices only.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from deepspeed.moe.layer import MoE
from deepspeed.moe.sharded_moe import TopKGate
from torch import distributed, nn
from torch.nn import functional

from pretrain.model.config import ModelConfig
from pretrain.model.moe.base import Fill, MoELayer, RouterStatistics, RoutingRecord
from pretrain.model.moe.config import DeepSpeedMoEConfig
from pretrain.model.moe.losses import router_statistics
from pretrain.model.moe.router import Routing, TopKRouter
from pretrain.model.moe.shared_experts import shared_experts

# What DeepSpeed's MOELayer takes from its gate: (loss, capacity, E, expert of each choice or -1 [K,
# T], slots [K, T], weights [K, T], counts [E])
GateDecision = tuple[
    torch.Tensor, torch.Tensor, int, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]


class _ObservedGate(TopKGate):
    """DeepSpeed's gate, which also leaves behind what it decided."""

    decision: GateDecision
    min_capacity: int

    def forward(self, input: torch.Tensor, *args: Any, **kwargs: Any) -> GateDecision:
        least_room = self.min_capacity
        # For one choice DeepSpeed refuses fewer tokens than the least room, as a step with a cache
        # has; room for all of them is enough.
        self.min_capacity = min(least_room, input.shape[0])
        try:
            self.decision = super().forward(input, *args, **kwargs)
        finally:
            self.min_capacity = least_room
        return self.decision

    def routing(self, x_TD: torch.Tensor) -> Routing:
        """The decision as our losses see it.

        Its choices before any drop are not kept, so the k largest probabilities take their place.
        """
        logits_TE = functional.linear(x_TD.float(), self.wg.weight.float())
        probs_TE = logits_TE.softmax(dim=-1)
        weights_TK, ids_TK = probs_TE.topk(self.k, dim=-1)
        return Routing(logits_TE, probs_TE, ids_TK, weights_TK)


class _RouterGate(nn.Module):
    """A router of ours in place of DeepSpeed's gate.

    An expert that is full refuses the last tokens, so that none depends on later ones.
    """

    decision: GateDecision

    def __init__(self, config: DeepSpeedMoEConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        gate = nn.Linear(hidden_size, config.num_experts, bias=config.router.bias)
        self.router = TopKRouter(
            config.router, gate, config.top_k, config.bias_balancing is not None
        )
        self.ep_group: distributed.ProcessGroup | None = None
        self.record: RoutingRecord | None = None
        self._routing: Routing

    def _set_ep_group(self, ep_group: distributed.ProcessGroup) -> None:
        self.ep_group = ep_group

    def forward(
        self,
        x_TD: torch.Tensor,
        used_token: Any = None,
        sparse_routes: bool = True,
        use_tutel: bool = False,
    ) -> GateDecision:
        """The sparse form of a decision, which is the only one that DeepSpeed's layer asks for."""
        self._routing = routing = self.router(x_TD, self.record)
        ids_TK, E = routing.topk_ids_TK, self.config.num_experts
        chosen_TE = torch.zeros(
            ids_TK.shape[0], E, dtype=torch.int64, device=ids_TK.device
        ).scatter_(1, ids_TK, 1)
        slots_TK = (chosen_TE.cumsum(dim=0) - 1).gather(1, ids_TK)
        counts_E = chosen_TE.sum(dim=0)
        capacity = self._capacity(counts_E, ids_TK.shape[0])
        found_TK = slots_TK < capacity
        experts_KT = torch.where(found_TK, ids_TK, -1).T.int()
        slots_KT, weights_KT = (slots_TK * found_TK).T.int(), (routing.topk_weights_TK * found_TK).T
        self.decision = (
            weights_KT.new_zeros(()),
            capacity,
            E,
            experts_KT,
            slots_KT,
            weights_KT,
            counts_E,
        )
        return self.decision

    def _capacity(self, counts_E: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """Rows that each expert has room for: the same on all ranks, because they are exchanged in
        equal parts.
        """
        config = self.config
        if config.drop_tokens:
            factor = config.capacity_factor if self.training else config.eval_capacity_factor
            return torch.tensor(
                max(
                    math.ceil(num_tokens * config.top_k / config.num_experts * factor),
                    config.min_capacity,
                )
            )
        fullest = counts_E.max()
        if self.ep_group is not None and distributed.get_world_size(self.ep_group) > 1:
            distributed.all_reduce(fullest, op=distributed.ReduceOp.MAX, group=self.ep_group)
        return fullest

    def routing(self, x_TD: torch.Tensor) -> Routing:
        return self._routing


class DeepSpeedMoE(MoELayer, MoE):
    """Capacity factors, drop or pad, noisy gates, residual experts (Rajbhandari et al. 2022).

    Interface of ``DroplessMoE``.
    """

    def __init__(self, model: ModelConfig, ep_size: int = 1, ep_rank: int = 0) -> None:
        config = cast(DeepSpeedMoEConfig, model.moe)
        kind, dropout = model.feed_forward.implementing_class(), model.dropout
        expert = kind(
            model.feed_forward,
            model.hidden_size,
            config.moe_intermediate_size,
            dropout.feed_forward,
            dropout.expert,
        )
        super().__init__(
            hidden_size=model.hidden_size,
            expert=expert,
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
        self.ep_rank, self.config = ep_rank, config
        if config.gate == "router":
            self.deepspeed_moe.gate = _RouterGate(config, model.hidden_size)
        else:
            self.deepspeed_moe.gate.__class__ = _ObservedGate
        self.shared = shared_experts(model)

    def fill_experts(self, name: str, fill: Fill) -> list[torch.Tensor]:
        done: list[torch.Tensor] = []
        first = self.ep_rank * self.num_local_experts
        for local, expert in enumerate(self.deepspeed_moe.experts.deepspeed_experts):
            for matrix, parameter in expert.named_parameters():
                fill(parameter, f"{name}.expert.{first + local}.{matrix}")
                done.append(parameter)
        return done

    def forward(
        self,
        x_BSD: torch.Tensor,
        record: RoutingRecord | None = None,
        fractions_E: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, RouterStatistics]:
        """[B, S, D] -> [B, S, D] and the router's statistics.

        DeepSpeed's own gate does not take ``record``: a recomputation repeats the same kernels on
        the same numbers with the same noise.
        """
        gate = self.deepspeed_moe.gate
        if isinstance(gate, _RouterGate):
            gate.record = record
        y_BSD, _, _ = super().forward(x_BSD)
        if self.shared is not None:
            y_BSD = y_BSD + self.shared(x_BSD)
        experts_KT, counts_E = gate.decision[3], gate.decision[6].float()
        dropped = 1.0 - (experts_KT >= 0).float().mean()
        routing = gate.routing(x_BSD.reshape(-1, x_BSD.shape[-1]))
        return y_BSD, router_statistics(
            self.config, routing, counts_E, x_BSD.shape[0], dropped, fractions_E
        )
