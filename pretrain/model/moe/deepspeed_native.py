"""DeepSpeed's native MoE layer, with its own gate or one of our routers, and our router losses.

Its ``l_aux`` is not used: its scale differs between k = 1, 2 and more, and for k <= 2 it counts
first choices only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from deepspeed.moe.layer import MoE
from deepspeed.moe.sharded_moe import TopKGate
from torch import distributed, nn
from torch.nn import functional

from pretrain.model.config import ModelConfig
from pretrain.model.moe.base import (
    MoELayer,
    RouterStatistics,
    RoutingRecord,
    Stream,
    whole_stream,
)
from pretrain.model.moe.config import DeepSpeedMoEConfig
from pretrain.model.moe.losses import router_statistics
from pretrain.model.moe.router import Routing, TopKRouter
from pretrain.model.moe.shared_experts import shared_experts

# The return value of DeepSpeed's gates in their sparse form: (loss, capacity, E, expert of each
# choice or -1 if it is dropped [K, T], slot in that expert [K, T], weights [K, T], counts [E]).
GateDecision = tuple[
    torch.Tensor, torch.Tensor, int, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]


class _ObservedGate(TopKGate):
    """DeepSpeed's gate, which also keeps its last decision for statistics and losses."""

    decision: GateDecision
    min_capacity: int

    def forward(self, input: torch.Tensor, *args: Any, **kwargs: Any) -> GateDecision:
        least_room = self.min_capacity
        # With top_k 1 DeepSpeed raises an error for fewer tokens than min_capacity, which a step
        # with a cache has; room for all of them is enough.
        self.min_capacity = min(least_room, input.shape[0])
        try:
            self.decision = super().forward(input, *args, **kwargs)
        finally:
            self.min_capacity = least_room
        return self.decision

    def routing(self, x_TD: torch.Tensor) -> Routing:
        """The decision in the form of our losses.

        DeepSpeed does not keep the choices before any drop, so the k largest probabilities replace
        them.
        """
        logits_TE = functional.linear(x_TD.float(), self.wg.weight.float())
        probs_TE = logits_TE.softmax(dim=-1)
        weights_TK, ids_TK = probs_TE.topk(self.k, dim=-1)
        return Routing(logits_TE, probs_TE, ids_TK, weights_TK)


class _RouterGate(nn.Module):
    """One of our routers in place of DeepSpeed's gate.

    A full expert drops the last tokens, so that no token's output depends on later ones.
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
        """Called by DeepSpeed's layer once the expert-parallel groups exist."""
        self.ep_group = ep_group

    def forward(
        self,
        x_TD: torch.Tensor,
        used_token: Any = None,
        sparse_routes: bool = True,
        use_tutel: bool = False,
    ) -> GateDecision:
        """The decision in sparse form, the only one that DeepSpeed's layer asks for."""
        self._routing = routing = self.router(x_TD, self.record)
        ids_TK = routing.topk_ids_TK
        E = self.config.num_experts
        chosen_TE = torch.zeros(
            ids_TK.shape[0], E, dtype=torch.int64, device=ids_TK.device
        ).scatter_(1, ids_TK, 1)
        # The slot of a token is the number of earlier tokens that chose the same expert: a
        # cumulative sum over tokens is what makes the drops causal.
        slots_TK = (chosen_TE.cumsum(dim=0) - 1).gather(1, ids_TK)
        counts_E = chosen_TE.sum(dim=0)
        capacity = self._capacity(counts_E, ids_TK.shape[0])
        found_TK = slots_TK < capacity
        # DeepSpeed wants choices first and int32; expert -1 with slot and weight 0 is a dropped
        # choice.
        experts_KT = torch.where(found_TK, ids_TK, -1).T.int()
        slots_KT = (slots_TK * found_TK).T.int()
        weights_KT = (routing.topk_weights_TK * found_TK).T
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
        """Rows per expert.

        The same on all ranks of the group, because DeepSpeed exchanges equal parts.
        """
        config = self.config
        if config.drop_tokens:
            factor = config.capacity_factor if self.training else config.eval_capacity_factor
            # From sizes that are equal on all ranks, so no collective is needed.
            return torch.tensor(
                max(
                    math.ceil(num_tokens * config.top_k / config.num_experts * factor),
                    config.min_capacity,
                )
            )
        # Without drops the fullest expert of any rank decides. Every rank of the group must reach
        # this collective in every forward pass.
        fullest = counts_E.max()
        if self.ep_group is not None and distributed.get_world_size(self.ep_group) > 1:
            distributed.all_reduce(fullest, op=distributed.ReduceOp.MAX, group=self.ep_group)
        return fullest

    def routing(self, x_TD: torch.Tensor) -> Routing:
        """The last decision, for the losses."""
        return self._routing


class DeepSpeedMoE(MoELayer, MoE):
    """Capacity factors, drops or padding, noisy gates, residual experts (Rajbhandari et al. 2022).

    Same interface as ``DroplessMoE``.
    """

    def __init__(self, model: ModelConfig, ep_size: int = 1, ep_rank: int = 0) -> None:
        config = cast(DeepSpeedMoEConfig, model.moe)
        kind = model.feed_forward.implementing_class()
        dropout = model.dropout
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
        self.ep_rank = ep_rank
        self.config = config
        if config.gate == "router":
            self.deepspeed_moe.gate = _RouterGate(config, model.hidden_size)
        else:
            # The class is swapped in place: replacing the module would lose the arguments DeepSpeed
            # built it with.
            self.deepspeed_moe.gate.__class__ = _ObservedGate
        self.shared = shared_experts(model)

    def expert_streams(self, name: str) -> Iterator[tuple[nn.Parameter, list[Stream]]]:
        # Local indices start at 0 on every rank; random streams are named by the global index.
        first = self.ep_rank * self.num_local_experts
        for local, expert in enumerate(self.deepspeed_moe.experts.deepspeed_experts):
            for matrix, parameter in expert.named_parameters():
                stream = f"{name}.expert.{first + local}.{matrix}"
                yield parameter, [whole_stream(stream, parameter.shape)]

    def forward(
        self,
        x_BSD: torch.Tensor,
        record: RoutingRecord | None = None,
        fractions_E: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, RouterStatistics]:
        """[B, S, D] -> [B, S, D] and the router's statistics.

        DeepSpeed's own gate ignores ``record``: a recomputation repeats the same kernels on the
        same values with the same noise.
        """
        gate = self.deepspeed_moe.gate
        if isinstance(gate, _RouterGate):
            gate.record = record
        y_BSD, _, _ = super().forward(x_BSD)
        if self.shared is not None:
            y_BSD = y_BSD + self.shared(x_BSD)
        # By position in GateDecision: 3 is the expert of each choice, 6 the counts before any drop.
        experts_KT = gate.decision[3]
        counts_E = gate.decision[6].float()
        dropped = 1.0 - (experts_KT >= 0).float().mean()
        routing = gate.routing(x_BSD.reshape(-1, x_BSD.shape[-1]))
        return y_BSD, router_statistics(
            self.config,
            routing,
            counts_E,
            x_BSD.shape[0],
            dropped,
            fractions_E,
            self.token_parts if self.training else None,
        )
