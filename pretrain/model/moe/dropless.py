"""The dropless layer: our router, losses and exchange inside DeepSpeed's ``AutoEPMoELayer``.

As an ``AutoEPMoELayer`` it makes DeepSpeed's engine create and bind the expert-parallel groups,
reduce expert gradients over the expert-data-parallel group, shard experts under every ZeRO stage
and write one file per global expert. Its own forward pass is not used: its router multiplies in the
model's precision and it has no balancing losses.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from deepspeed.checkpoint.constants import AFFINE_MAP, AUTOEP_PARAM_LOGICAL_SHAPE, DS_AUTOEP_UC_META
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer, autoep_placement_to_affine_map
from deepspeed.module_inject.auto_ep_presets.base import AutoEPConfig, MoELayerSpec
from torch import nn
from torch.nn import functional

from pretrain.core.errors import ConfigError
from pretrain.model.config import ModelConfig
from pretrain.model.moe.base import (
    MoELayer,
    RouterStatistics,
    RoutingRecord,
    Stream,
    whole_stream,
)
from pretrain.model.moe.config import DroplessMoEConfig
from pretrain.model.moe.dispatch import Grouping, combine, gather_tokens, group_rows
from pretrain.model.moe.exchange.base import Routed, check_parts_here
from pretrain.model.moe.exchange.config import exchange_section, expert_kernel_section
from pretrain.model.moe.experts import ExpertBiases, ExpertForm, Experts
from pretrain.model.moe.losses import router_statistics
from pretrain.model.moe.router import Routing, TopKRouter
from pretrain.model.moe.shared_experts import shared_experts

# Tokens of a call up to which kernels that group them on the device cost more than the host.
FEW_TOKENS = 32


def _layer_spec(config: DroplessMoEConfig, hidden_size: int, rows: int) -> MoELayerSpec:
    """The description that AutoEP would have detected in a Hugging Face model.

    Only the sizes matter here: the forward pass is ours.
    """
    return MoELayerSpec(
        moe_module_name="",
        model_family="custom",
        router_name="gate",
        experts_name="experts",
        expert_storage="fused_3d",
        expert_w1_name="gate_up_proj",
        expert_w2_name="down_proj",
        expert_w3_name=None,
        num_experts=config.num_experts,
        top_k=config.top_k,
        hidden_size=hidden_size,
        ffn_hidden_size=rows,
        score_func="softmax",
        score_apply="post",
        route_norm=False,
        gate_bias=config.router.bias,
        return_router_logits=False,
        router_logits_capture_target="none",
        router_logits_capture_index=None,
        router_logits_capture_layer_name=None,
        has_shared_experts=False,
        shared_experts_name="",
    )


class _WeightShapes(nn.Module):
    """The module that AutoEP copies its weights from, with the shapes of all experts.

    Each weight is one stored element, expanded, so that no rank ever holds all experts.
    """

    def __init__(self, config: DroplessMoEConfig, hidden_size: int, rows: int) -> None:
        super().__init__()
        zero = torch.zeros(())
        num_experts = config.num_experts

        # On the meta device nothing is stored, and torch imports sympy to copy what is expanded.
        def shaped(*shape: int) -> nn.Parameter:
            return nn.Parameter(zero.new_empty(shape) if zero.is_meta else zero.expand(shape))

        self.gate = nn.Linear(hidden_size, num_experts, bias=config.router.bias)
        self.experts = nn.Module()
        self.experts.gate_up_proj = shaped(num_experts, 2 * rows, hidden_size)
        self.experts.down_proj = shaped(num_experts, hidden_size, rows)


class DroplessMoE(MoELayer, AutoEPMoELayer):
    """Every token reaches all of its top_k experts.

    ``w1``, ``w2``, ``w3`` are uninitialised until ``model.init`` fills them.

    The biases of all experts, which are small, are on every rank as dense parameters ``b1 b3`` [E,
    X] and ``b2`` [E, D]. A rank uses the rows of its own experts; the other rows have zero
    gradients, so the average over all ranks is what the expert's own group would compute.

    Args:
        ep_size: ranks that share the experts; ``ep_rank`` holds experts [ep_rank * e, (ep_rank + 1)
            * e).
    """

    def __init__(self, model: ModelConfig, ep_size: int = 1, ep_rank: int = 0) -> None:
        form = model.feed_forward
        config = cast(DroplessMoEConfig, model.moe)
        if not form.gated and config.moe_intermediate_size % 2:
            raise ConfigError(
                f"model.moe.moe_intermediate_size ({config.moe_intermediate_size}) must be even: "
                f"dropless experts keep the one matrix before {form.kind} in two halves"
            )
        # Kinds with one matrix before the activation have its two halves in w1 and w3.
        rows = (
            config.moe_intermediate_size * form.expansion
            if form.gated
            else config.moe_intermediate_size // 2
        )
        layer_config = AutoEPConfig()
        # Our Experts choose the kernel; True would refuse a torch without grouped_mm.
        layer_config.use_grouped_mm = False
        shapes = _WeightShapes(config, model.hidden_size, rows)
        super().__init__(
            _layer_spec(config, model.hidden_size, rows), shapes, ep_size, ep_rank, layer_config
        )
        # AutoEP makes it where the experts are, which may be the meta device.
        self.tokens_per_expert = torch.zeros(config.num_experts)
        # The parameters stay the ones that AutoEP tagged for the engine (expert group, partition,
        # checkpoint); only the modules around them are replaced.
        tagged = super().get_submodule("experts")
        gate = super().get_submodule("router").gate
        w2 = self._with_width(tagged.w2, config.moe_intermediate_size)
        expert = ExpertForm(form.implementing_class(), form, model.dropout.feed_forward)
        first = ep_rank * self.num_local_experts
        # A model that is built on the meta device as a whole is only counted, and lacks nothing.
        is_counted = torch.empty(0).is_meta
        if not is_counted:
            check_parts_here(config, ep_size)
        kernel = expert_kernel_section("auto" if is_counted else config.expert_kernel)
        self.experts = Experts(tagged.w1, w2, tagged.w3, expert, kernel.implementing_class(), first)
        exchange = exchange_section("all_to_all" if is_counted else config.exchange)
        # Imported only if it is used: it may need a package that this machine lacks.
        self.journey = None if ep_size == 1 else exchange.implementing_class()
        self.deduplicate = config.deduplicates(ep_size, model.dropout.expert)
        self.b1 = self.b2 = self.b3 = None
        if form.bias:
            self.b1, self.b3 = (
                nn.Parameter(torch.zeros(config.num_experts, rows)) for _ in range(2)
            )
            self.b2 = nn.Parameter(torch.zeros(config.num_experts, model.hidden_size))
        self.router = TopKRouter(
            config.router, gate, config.top_k, config.bias_balancing is not None
        )
        self.shared = shared_experts(model)
        self.config = config
        self.dropout = model.dropout.expert

    def expert_streams(self, name: str) -> Iterator[tuple[nn.Parameter, list[Stream]]]:
        experts = self.experts
        names = [f"{name}.expert.{experts.first + one}" for one in range(self.num_local_experts)]

        def streams(parameter: nn.Parameter, matrix: str) -> list[Stream]:
            shape = parameter.shape[1:]
            return [
                whole_stream(f"{expert}.{matrix}", shape, index * shape.numel())
                for index, expert in enumerate(names)
            ]

        yield experts.w2, streams(experts.w2, "down_proj.weight")
        if experts.form.config.gated:
            yield experts.w1, streams(experts.w1, "gate_proj.weight")
            yield experts.w3, streams(experts.w3, "up_proj.weight")
            return
        # One stream for the whole matrix: its halves start as they would in other layers.
        for half, parameter in enumerate((experts.w1, experts.w3)):
            rows, columns = parameter.shape[1:]
            size = rows * columns
            yield (
                parameter,
                [
                    Stream(
                        name=f"{expert}.up_proj.weight",
                        shape=(2 * rows, columns),
                        start=index * size,
                        first=half * size,
                        last=(half + 1) * size,
                    )
                    for index, expert in enumerate(names)
                ],
            )

    def _with_width(self, tagged: nn.Parameter, width: int) -> nn.Parameter:
        """w2 for the hidden units that the activation returns, tagged as AutoEP's own parameter."""
        if tagged.shape[-1] == width:
            return tagged
        parameter = nn.Parameter(tagged.new_empty(*tagged.shape[:-1], width))
        # The tags are attributes of the parameter; two of them hold its shape and have to follow
        # it.
        parameter.__dict__.update(tagged.__dict__)
        shape = [self.num_experts, *parameter.shape[1:]]
        affine_map = autoep_placement_to_affine_map(
            self.expert_placement_descriptor, shape
        ).to_dict()
        tags = getattr(tagged, DS_AUTOEP_UC_META) | {
            AFFINE_MAP: affine_map,
            AUTOEP_PARAM_LOGICAL_SHAPE: shape,
        }
        setattr(parameter, DS_AUTOEP_UC_META, tags)
        return parameter

    def forward(
        self,
        x_BSD: torch.Tensor,
        record: RoutingRecord | None = None,
        fractions_E: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, RouterStatistics | None]:
        """[B, S, D] -> [B, S, D] and the router's statistics.

        The statistics are None in inference mode, where latency counts and nobody reads them.

        Args:
            record: routing decision to write or, if it is filled, to repeat (activation
                checkpointing).
            fractions_E: f_e of the load-balance loss if it is counted over the global batch.
        """
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        routing = self.router(x_TD, record)
        if (
            torch.is_inference_mode_enabled()
            and (len(x_TD) == 1 or (x_TD.is_cpu and len(x_TD) <= FEW_TOKENS))
            and self.ep_size == 1
            and not self.experts.is_grouped(x_TD)
        ):
            return self._few_tokens(x_TD, routing).view_as(x_BSD), None
        # [T, K] choices, flattened, sorted by expert: each expert's rows become contiguous.
        grouping = group_rows(routing.topk_ids_TK.reshape(-1), self.num_experts)
        y_TD = (
            self._local(x_TD, routing, grouping)
            if self.ep_size == 1
            else self._exchanged(x_TD, routing, grouping, record)
        )
        if torch.is_inference_mode_enabled():
            return y_TD.view_as(x_BSD), None
        nothing_dropped = routing.logits_TE.new_zeros(())
        statistics = router_statistics(
            self.config,
            routing,
            grouping.counts_E.float(),
            x_BSD.shape[0],
            nothing_dropped,
            fractions_E,
            self.token_parts if self.training else None,
        )
        return y_TD.view_as(x_BSD), statistics

    def _few_tokens(self, x_TD: torch.Tensor, routing: Routing) -> torch.Tensor:
        """The same values for few tokens, as in each step of generation: the device sorts none."""
        chosen = routing.topk_ids_TK.flatten().tolist()
        rows_RD = self.experts(x_TD, None, self._local_biases(), chosen)
        rows_RD = functional.dropout(rows_RD, self.dropout, self.training)
        weights_TK = routing.topk_weights_TK
        rows_TKD = rows_RD.unflatten(0, weights_TK.shape)
        y_TD = torch.bmm(weights_TK[:, None], rows_TKD.float())[:, 0].to(rows_RD.dtype)
        return y_TD if self.shared is None else y_TD + self.shared(x_TD)

    def _local(self, x_TD: torch.Tensor, routing: Routing, grouping: Grouping) -> torch.Tensor:
        """The layer's output [T, D] if this rank has all experts."""
        order_R, inverse_R, counts_E = grouping
        rows_RD = gather_tokens(x_TD, order_R, inverse_R, self.top_k)
        rows_RD = self.experts(rows_RD, counts_E, self._local_biases())
        # Before the weights, so that a dropped element is one of an expert's output.
        rows_RD = functional.dropout(rows_RD, self.dropout, self.training)
        y_TD = combine(
            rows_RD, order_R=order_R, inverse_R=inverse_R, weights_TK=routing.topk_weights_TK
        )
        return y_TD if self.shared is None else y_TD + self.shared(x_TD)

    def _exchanged(
        self,
        x_TD: torch.Tensor,
        routing: Routing,
        grouping: Grouping,
        record: RoutingRecord | None,
    ) -> torch.Tensor:
        """The same if experts are on other ranks; the shared ones compute while tokens travel."""
        assert self.journey is not None
        dropout = self.dropout if self.training else 0.0
        journey = self.journey(self, Routed(x_TD, routing, grouping, dropout, record))
        shared_TD = None if self.shared is None else self.shared(x_TD)
        rows_RD, counts_e = journey.arrive()
        # A rank that received no row runs its experts all the same, for a gradient of zeros: the
        # reduction over the expert-data-parallel group expects one from each of its ranks.
        y_TD = journey.back(self.experts(rows_RD, counts_e, self._local_biases()))
        return y_TD if shared_TD is None else y_TD + shared_TD

    def _local_biases(self) -> ExpertBiases | None:
        if self.b1 is None or self.b2 is None or self.b3 is None:
            return None
        mine = slice(self.experts.first, self.experts.first + self.num_local_experts)
        return ExpertBiases(self.b1[mine], self.b3[mine], self.b2[mine])
