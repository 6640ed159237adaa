"""A module in the place of the package deep_ep: version 2's ``ElasticBuffer`` by its definition.

It asserts what the package demands of its arguments and gathers everything from all ranks, in the
expanded layout alone. Rows of one expert come in an order that depends on the call, because the
package's depends on arrival times.
"""

from __future__ import annotations

import importlib.machinery
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import distributed


class Handle(SimpleNamespace):
    """What a dispatch leaves for the ones that repeat it, as ``EPHandle``."""


class ElasticBuffer:
    """As the package's; ``calls`` counts what was asked of all buffers."""

    calls: dict[str, int] = {}

    def __init__(self, group: Any, **sizes: Any) -> None:
        assert sizes["num_max_tokens_per_rank"] > 0 and sizes["explicitly_destroy"]
        assert not sizes["use_fp8_dispatch"]
        self.group, self.sizes = group, sizes
        self._count("buffers")

    def _count(self, name: str) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1

    def destroy(self) -> None:
        self._count("destroyed")

    def _gathered(self, value: Any) -> list[Any]:
        everyones: list[Any] = [None] * distributed.get_world_size(self.group)
        distributed.all_gather_object(everyones, value, group=self.group)
        return everyones

    def dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        num_experts: int | None = None,
        expert_alignment: int | None = None,
        num_sms: int = 0,
        handle: Handle | None = None,
        do_expand: bool = False,
    ) -> tuple[torch.Tensor, None, torch.Tensor | None, Handle, None]:
        assert x.dtype == torch.bfloat16 and x.shape[1] == self.sizes["hidden"] and do_expand
        assert len(x) <= self.sizes["num_max_tokens_per_rank"]
        if handle is None:
            assert topk_idx is not None and num_experts and expert_alignment == 1
            assert topk_idx.dtype == torch.int64 and topk_weights.dtype == torch.float32
            handle = self._handle(topk_idx, num_experts)
            self._count("dispatched")
        else:
            assert topk_idx is None
            self._count("replayed")
        tokens = self._gathered((x.detach(), None if topk_weights is None else topk_weights))
        received = [tokens[rank][0][token] for rank, token, _ in handle.rows]
        weights = None
        if topk_weights is not None:
            found = [tokens[rank][1][token, choice] for rank, token, choice in handle.rows]
            weights = torch.stack(found).detach() if found else topk_weights.new_empty(0)
        rows = torch.stack(received) if received else x.new_empty(0, x.shape[1])
        # The package's tensors may have more rows than arrived.
        more = rows.new_full((1, rows.shape[1]), float("nan"))
        return torch.cat((rows, more)), None, weights, handle, None

    def _handle(self, topk_idx: torch.Tensor, num_experts: int) -> Handle:
        chosen = self._gathered(topk_idx)
        mine = num_experts // len(chosen)
        first = distributed.get_rank(self.group) * mine
        of_expert: list[list[tuple[int, int, int]]] = [[] for _ in range(mine)]
        for rank, ids in enumerate(chosen):
            for token, choice in (ids // mine * mine == first).nonzero().tolist():
                of_expert[int(ids[token, choice]) - first].append((rank, token, choice))
        if self.calls.get("dispatched", 0) % 2:
            of_expert = [rows[::-1] for rows in of_expert]
        ends = torch.tensor([len(rows) for rows in of_expert]).cumsum(0).int()
        return Handle(
            rows=[row for rows in of_expert for row in rows],
            topk_idx=topk_idx.clone(),
            do_expand=True,
            num_expanded_tokens=int(ends[-1]),
            psum_num_recv_tokens_per_expert=ends,
        )

    def combine(
        self,
        x: torch.Tensor,
        handle: Handle,
        topk_weights: torch.Tensor | None = None,
        num_sms: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        assert x.dtype == torch.bfloat16
        self._count("combined")
        everyones = self._gathered((x.detach(), topk_weights, handle.rows))
        here, shape = distributed.get_rank(self.group), handle.topk_idx.shape
        sums = torch.zeros(shape[0], x.shape[1])
        weights = None if topk_weights is None else torch.zeros(shape)
        for values, of_rows, rows in everyones:
            for index, (rank, token, choice) in enumerate(rows):
                if rank == here:
                    sums[token] += values[index].float()
                    if weights is not None:
                        weights[token, choice] += of_rows.reshape(-1)[index]
        return sums.to(x.dtype), weights, None


def install() -> None:
    """Put the stand-in where ``import deep_ep`` finds it."""
    module = ModuleType("deep_ep")
    module.__spec__ = importlib.machinery.ModuleSpec("deep_ep", None)
    module.ElasticBuffer = ElasticBuffer  # type: ignore[attr-defined]
    module.topk_idx_t = torch.int64  # type: ignore[attr-defined]
    sys.modules["deep_ep"] = module
