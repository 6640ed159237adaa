"""One training step on DeepSpeed's engine, right for every ZeRO stage, world size and ep_size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.utils import groups, safe_get_full_fp32_param
from torch import distributed, nn

from data_pipeline.loading.batch import Batch
from pretrain.config.recipe import Recipe
from pretrain.config.rules.sections import expert_shards
from pretrain.config.timeline import Phase, Timeline
from pretrain.engine.clip import clip_gradients, global_grad_norm
from pretrain.engine.compile import compile_blocks
from pretrain.engine.expert_tables import count_in_norm, expert_rows
from pretrain.engine.float8 import convert_linears
from pretrain.engine.monitor import Monitor, without_monitors
from pretrain.engine.phases import FrozenParameters, set_batch_sizes
from pretrain.engine.precision import set_matmul_precision
from pretrain.engine.sparse_optimizer import SparseOptimizer
from pretrain.engine.topology import Topology
from pretrain.engine.veto import UpdateVeto
from pretrain.engine.zero_layout import give_shards
from pretrain.model.decoder import DecoderLM, RouterTotals, TrainOutput
from pretrain.model.init import initialize
from pretrain.model.moe.base import MoELayer
from pretrain.model.moe.product_keys import RunningStatistics
from pretrain.model.moe.router import TopKRouter
from pretrain.optim.frozen import frozen_parameters
from pretrain.optim.matrix_shards import MatrixOptimizer
from pretrain.optim.param_groups import (
    build_optimizer,
    learning_rate_scale,
    parameter_groups,
    peak_learning_rates,
)

# Fills a model that has part i of n of the experts: model, i, n.
WeightLoader = Callable[[DecoderLM, int, int], None]
# Says True where a step must not be applied: of its cross-entropy per token (nats) and gradient norm, both over all ranks.
Judge = Callable[[float, float], bool]


@dataclass(frozen=True)
class StepResult:
    """One optimizer step as this rank saw it; tensors stay on the device until :meth:`reduced`.

    Attributes:
        losses: [2] fp32, mean over this rank's micro batches: cross-entropy per token (nats), and the whole loss that was minimised; [3] with
            multi-token prediction, whose own cross-entropy per token of the same normalizer comes last.
        router: sums over this rank's micro batches (None for a dense model).
        micro_batches: how many those are.
        grad_norm: L2 norm over the whole model before clipping, the same on every rank.
        applied: False where the update was skipped, because a gradient was not finite or the judge refused it.
        refused: True where the judge did.
        micro_losses: [] fp32 each, the loss that was minimised of every micro batch.
    """

    losses: torch.Tensor
    router: RouterTotals | None
    micro_batches: int
    grad_norm: float
    applied: bool
    refused: bool
    micro_losses: tuple[torch.Tensor, ...]


class Engine:
    """A model on its devices with its optimizer, driven step by step.

    Attributes:
        now: the recipe as it is in the phase that was entered last.

    Args:
        recipe: with ``model.vocab_size`` resolved.
        ds_config: resolved by :func:`pretrain.engine.ds_config.resolve_ds_config`.
        precision: ``fp32``, ``bf16``, ``fp16`` or ``fp8``.
        fill: overwrites the random weights of the fp32 model on the host.
    """

    def __init__(
        self,
        recipe: Recipe,
        ds_config: dict[str, Any],
        precision: str,
        topology: Topology,
        fill: WeightLoader | None = None,
    ) -> None:
        self.recipe = self.now = recipe
        self.topology = topology
        self.zero_stage = int(ds_config.get("zero_optimization", {}).get("stage", 0))
        self.precision = precision
        set_matmul_precision(recipe.train.tf32)
        # Built in fp32 on the host: DeepSpeed casts, keeps fp32 master weights and moves it to the device.
        shards = expert_shards(recipe, topology.world_size, self.zero_stage)
        self.expert_part, self.expert_parts = topology.rank % shards, shards
        model = DecoderLM(
            recipe.model, shards, self.expert_part, recipe.train.activation_checkpointing
        )
        initialize(model, recipe.seed)
        if fill is not None:
            fill(model, self.expert_part, self.expert_parts)
        names = [name for name, _ in model.named_parameters()]
        self._frozen_names = {
            stage.number: frozen_parameters(
                names, stage.frozen, recipe.model, f"phases.{stage.name}.frozen"
            )
            for stage in Timeline(recipe).stages
            if stage.frozen
        }
        if precision == "fp8":
            convert_linears(model, topology.device)
        self.rows = expert_rows(model, recipe, self.zero_stage, topology)
        # What is drawn while training (dropout, router noise) differs between ranks; checkpoints carry the state.
        torch.manual_seed(recipe.seed + topology.rank)
        self.peak_learning_rates = peak_learning_rates(recipe.optimizer)
        optimizer = build_optimizer(
            parameter_groups(model, recipe.model, recipe.optimizer), recipe.optimizer
        )
        self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=without_monitors(ds_config)
        )
        self.monitor = self.deepspeed.monitor = Monitor(
            ds_config, topology.is_main, lambda: self.deepspeed.global_samples
        )
        if self.zero_stage == 0 and precision != "fp32":
            # DeepSpeed takes one step on zero gradients there to make the optimizer state: forget it, or Adam starts at its second step.
            # The learning rate of the groups is still 0, so the weights have not decayed.
            self.optimizer.state.clear()
        if isinstance(optimizer, MatrixOptimizer):
            give_shards(self.optimizer, optimizer, self.zero_stage, topology.device)
        if self.rows is not None:
            count_in_norm(self.optimizer, self.zero_stage, lambda: self._rows_norm)
        self.veto = UpdateVeto(self.optimizer, self.zero_stage)
        if recipe.train.compile == "blocks":
            compile_blocks(model)
        self.model = model
        self._frozen = (
            FrozenParameters(optimizer, self._master_part) if self._frozen_names else None
        )
        self._routers = [module for module in model.modules() if isinstance(module, TopKRouter)]
        self._moe_layers = [module for module in model.modules() if isinstance(module, MoELayer)]
        self._routed_usage_LE: torch.Tensor | None = None
        self._expert_group: distributed.ProcessGroup | None = None
        if topology.ep_size > 1 and self.rows is None:
            self._expert_group = groups._get_expert_parallel_group(f"ep_size_{topology.ep_size}")

    def enter(self, stage: Phase) -> None:
        """Makes the following steps those of a phase: its batch sizes, positions and frozen parameters. Between two steps, and after a load."""
        before, self.now = self.now, stage.recipe
        sizes = self.now.train
        set_batch_sizes(
            self.deepspeed,
            sizes.micro_batch_size,
            sizes.global_batch_size // (sizes.micro_batch_size * self.topology.world_size),
        )
        if self.now.model.position != before.model.position:
            self.model.config = self.now.model
            self.model.position = self.now.model.position.implementing_class()(self.now.model)
        frozen = self._frozen_names.get(stage.number, set())
        if self._frozen is not None:
            self._frozen.freeze(
                [parameter for name, parameter in self.model.named_parameters() if name in frozen]
            )
        if self.rows is not None:
            self.rows.frozen = frozen & self.rows.tables.keys()

    def train_step(
        self,
        micro_batches: list[Batch],
        learning_rate_factor: float,
        balance_rate: float = 0.0,
        judge: Judge | None = None,
        after_backward: Callable[[int], None] | None = None,
    ) -> StepResult:
        """Forward and backward over this rank's micro batches, then one optimizer step.

        The loss of a step is the mean over all counted tokens of the global batch, however they are spread over micro batches and ranks,
        plus the mean of the micro batches' router losses.

        Args:
            balance_rate: how far the routers' balancing biases move after the step, where they have any.
            judge: is asked before the update, on every rank alike, where the gradient is finite. It costs one small all-reduce a step.
            after_backward: is told the number of each micro batch when its local gradients are there.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = (
                self.peak_learning_rates[group["role"]]
                * learning_rate_scale(group)
                * learning_rate_factor
            )
        self.deepspeed.train()
        batches = [batch.to(self.topology.device) for batch in micro_batches]
        normalizer = self._tokens_per_micro_batch(batches)
        fractions_LE = self._global_fractions(batches, normalizer)
        losses = torch.zeros(
            2 if self.recipe.model.multi_token_prediction is None else 3,
            device=self.topology.device,
        )
        self.veto.begin(
            None if judge is None else lambda norm: judge(*self._over_ranks(losses[0], norm))
        )
        router: RouterTotals | None = None
        micro_losses: list[torch.Tensor] = []
        for number, batch in enumerate(batches):
            output = self._forward(batch, normalizer, fractions_LE)
            self.deepspeed.backward(self._scaled(output.loss))
            if after_backward is not None:
                after_backward(number)
            micro_losses.append(output.loss.detach())
            ahead = [] if output.multi_token_nll is None else [output.multi_token_nll / normalizer]
            losses += torch.stack((output.nll / normalizer, micro_losses[-1], *ahead)) / len(
                batches
            )
            if batch is batches[-1]:
                # DeepSpeed reduces gradients in the backward pass of the last micro batch and updates in its step.
                self._rows_norm = (
                    torch.zeros(()) if self.rows is None else self.rows.reduce(self.loss_scale())
                )
                stage0_norm = self._clip_at_stage_0()
            self.deepspeed.step()
            router = _add(router, output.router)
        norm = stage0_norm if stage0_norm is not None else self.deepspeed.get_global_grad_norm()
        refused = self.veto.refused
        norm = self.veto.norm if refused else float(norm)
        applied = self.deepspeed.was_step_applied() and not self.veto.withheld
        if self.rows is not None:
            self._step_rows(self.rows, norm, applied, learning_rate_factor)
        if router is not None:
            counts_LE = router.counts_LE.long()  # fp32 counts exactly within a step, not over many
            self._routed_usage_LE = (
                counts_LE
                if self._routed_usage_LE is None
                else self._routed_usage_LE.add_(counts_LE)
            )
        if applied and balance_rate > 0 and router is not None:
            self._move_balance_biases(router, balance_rate)
        return StepResult(losses, router, len(batches), norm, applied, refused, tuple(micro_losses))

    @torch.no_grad()
    def take_usage(self) -> torch.Tensor | None:
        """How often each expert was chosen in training since the last call, in this process: int64 [L, E] on the CPU, summed over all ranks.

        Layers are those of ``ModelConfig.routed_layers``, in that order. Choices count before any drop, also those of a step that was skipped.
        None for a dense model and where there was no step. Every rank must call it, because it is one all-reduce; the counters start anew.
        """
        usage_LE, self._routed_usage_LE = self._routed_usage_LE, None
        if counted := self._counted_by_layers():
            usage_LE = torch.stack(counted)
            for counts_E in counted:
                counts_E.zero_()
        return None if usage_LE is None else self.topology.all_reduce_sum(usage_LE).cpu()

    def usage_so_far(self) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """A copy of the counters that :meth:`take_usage` starts anew, for :meth:`restore_usage`."""
        routed = self._routed_usage_LE
        return None if routed is None else routed.clone(), [
            counts_E.clone() for counts_E in self._counted_by_layers()
        ]

    def restore_usage(self, usage: tuple[torch.Tensor | None, list[torch.Tensor]]) -> None:
        self._routed_usage_LE = usage[0]
        for counts_E, saved_E in zip(self._counted_by_layers(), usage[1], strict=True):
            counts_E.copy_(saved_E)

    def _counted_by_layers(self) -> list[torch.Tensor]:
        """The counters of layers that count their experts' choices themselves."""
        counters = [layer.counted_choices_E for layer in self._moe_layers]
        return [counts_E for counts_E in counters if counts_E is not None]

    def _step_rows(
        self, rows: SparseOptimizer, norm: float, applied: bool, learning_rate_factor: float
    ) -> None:
        """The tables' part of the step, clipped by the factor that DeepSpeed has used; then norms by running statistics move too.

        A step that is skipped moves neither.
        """
        clip = self.recipe.train.grad_clip
        if applied and math.isfinite(norm):
            factor = 1.0 / max(1.0, (norm + 1e-6) / clip) if clip > 0 else 1.0
            rows.step(self.peak_learning_rates["matrix"] * learning_rate_factor, factor)
        else:
            rows.discard()
        for module in self.model.modules():
            if isinstance(module, RunningStatistics):
                module.absorb(self.topology.all_reduce_sum) if applied else module.forget()

    def _move_balance_biases(self, router: RouterTotals, rate: float) -> None:
        """By the load of the whole global batch, so that every rank moves its copy alike."""
        loads_LE = self.topology.all_reduce_sum(router.counts_LE)
        for module, load_E in zip(self._routers, loads_LE, strict=True):
            if self._frozen is None or id(module.gate.weight) not in self._frozen.ids:
                module.move_balance_bias(load_E, rate)

    def _over_ranks(self, loss: torch.Tensor, norm: float) -> tuple[float, float]:
        """The mean loss of all ranks, and the norm; to the last bit the same on every rank."""
        values = torch.stack((loss, torch.full_like(loss, norm)))
        loss_mean, norm_mean = (
            self.topology.all_reduce_sum(values) / self.topology.world_size
        ).tolist()
        return loss_mean, norm_mean

    def _forward(
        self,
        batch: Batch,
        normalizer: torch.Tensor | float,
        fractions_LE: torch.Tensor | None = None,
    ) -> TrainOutput:
        output: TrainOutput = self.deepspeed(
            batch.input_ids_BS,
            batch.labels_BS,
            normalizer,
            batch.document_ids_BS,
            fractions_LE,
            batch.position_ids_BS,
        )
        return output

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> tuple[float, int]:
        """Summed negative log-likelihood in nats and counted tokens over all ranks' batches. Every rank must pass as many batches."""
        self.deepspeed.eval()
        totals = torch.zeros(2, dtype=torch.float64)
        for batch in batches:
            on_device = batch.to(self.topology.device)
            output = self._forward(on_device, 1.0)
            totals += torch.stack(
                (output.nll.double().cpu(), (batch.labels_BS >= 0).sum().double())
            )
        nll, tokens = self.topology.all_reduce_sum(totals.to(self.topology.device)).tolist()
        return nll, int(tokens)

    def learning_rate(self) -> float:
        """The learning rate of matrices in the last step, at their base widths."""
        return next(
            float(group["lr"]) / learning_rate_scale(group)
            for group in self.optimizer.param_groups
            if group["role"] == "matrix"
        )

    def loss_scale(self) -> float:
        """The fp16 loss scale; 1 in other precisions."""
        return float(self._loss_scaler.cur_scale) if self.precision == "fp16" else 1.0

    @contextmanager
    def without_loss_scale(self) -> Iterator[None]:
        """Takes the fp16 loss scale away for what runs inside."""
        if self.precision != "fp16":
            yield
            return
        scale, self._loss_scaler.cur_scale = self._loss_scaler.cur_scale, 1.0
        try:
            yield
        finally:
            self._loss_scaler.cur_scale = scale

    @property
    def _loss_scaler(self) -> Any:
        """What holds the fp16 loss scale: the optimizer of stage 0 keeps it elsewhere than those of the other stages."""
        return (
            self.optimizer.loss_scale_config if self.zero_stage == 0 else self.optimizer.loss_scaler
        )

    def master_weight(self, parameter: nn.Parameter) -> torch.Tensor:
        """The whole fp32 weight of one parameter (this rank's experts for an expert's). Every rank must call it in the same order."""
        if self.zero_stage == 0:
            return self._stage_0_masters().get(id(parameter), parameter).detach()
        full = safe_get_full_fp32_param(parameter)
        assert full is not None, "every trainable parameter is in the optimizer"
        return full.detach()

    def _stage_0_masters(self) -> dict[int, torch.Tensor]:
        """At stage 0 in low precision DeepSpeed keeps the fp32 copies in lists beside the model's parameters."""
        if self.precision == "fp32":
            return {}
        pairs = zip(self.optimizer.fp16_groups, self.optimizer.fp32_groups, strict=True)
        return {
            id(low): high for lows, highs in pairs for low, high in zip(lows, highs, strict=True)
        }

    def _master_part(self, parameter: nn.Parameter) -> torch.Tensor | None:
        """What this rank's optimizer holds of a parameter's fp32 weights, not as a copy; None where it holds none of them."""
        if self.zero_stage == 0:
            return self._stage_0_masters().get(id(parameter), parameter)
        if self.zero_stage == 3:
            part: torch.Tensor = self.optimizer._get_fp32_opt_state_partition(
                parameter, release_swap_buffers=False
            )[0]
            return part
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        return None if mapping is None else mapping.get_hp_fragment()

    def _scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """What is differentiated. Where the loss is not finite no gradient is, so that every stage sees it and skips the step.

        DeepSpeed's engine scales the loss for fp16 at stages 1 to 3; its stage 0 optimizer unscales, but nothing has scaled.
        """
        loss = loss * (1.0 + 0.0 * loss.detach())
        if self.precision == "fp16" and self.zero_stage == 0:
            return loss * self.loss_scale()
        return loss

    def _clip_at_stage_0(self) -> torch.Tensor | None:
        """The global norm before clipping; None at stages 1 to 3, where DeepSpeed's norm and clipping are right."""
        if self.zero_stage > 0:
            return None
        norm = torch.hypot(
            global_grad_norm(self.model.parameters(), self._expert_group) / self.loss_scale(),
            self._rows_norm.to(self.topology.device),
        )
        if self.recipe.train.grad_clip > 0:
            clip_gradients(self.model.parameters(), norm, self.recipe.train.grad_clip)
        self.veto.before_stage_0_step(list(self.model.parameters()), float(norm), self.precision)
        return norm

    def _tokens_per_micro_batch(self, batches: list[Batch]) -> torch.Tensor | float:
        """Counted tokens of the global batch / number of its micro batches: the same divisor for every micro batch of the step."""
        sizes = self.now.train
        if not self.recipe.data.leaves_out_labels:
            return float(sizes.micro_batch_size * sizes.sequence_length)
        counted = torch.stack([(batch.labels_BS >= 0).sum() for batch in batches]).sum()
        return (
            self.topology.all_reduce_sum(counted) / (len(batches) * self.topology.world_size)
        ).float()

    @torch.no_grad()
    def _global_fractions(
        self, batches: list[Batch], normalizer: torch.Tensor | float
    ) -> torch.Tensor | None:
        """f_e over the whole global batch, [L, E], by a forward pass over all its micro batches before the first backward pass.

        The loss is linear in f, so counting first makes it exact under accumulation (Qiu et al. 2025, "Demons in the detail").
        """
        moe = self.recipe.model.routing
        if moe is None or moe.balance_scope == "micro_batch":
            return None
        counts_LE = torch.zeros(
            len(self.recipe.model.routed_layers), moe.num_experts, device=self.topology.device
        )
        for batch in batches:
            output = self._forward(batch, normalizer)
            assert output.router is not None
            counts_LE += output.router.counts_LE
        return self.topology.all_reduce_sum(counts_LE) / self.now.train.tokens_per_step


def _add(total: RouterTotals | None, more: RouterTotals | None) -> RouterTotals | None:
    if total is None or more is None:
        return more
    return RouterTotals(*(a + b for a, b in zip(total, more, strict=True)))


def reduce_steps(
    results: list[StepResult], topology: Topology
) -> tuple[list[list[float]], RouterTotals | None]:
    """Joins several steps over all ranks with two collectives and one transfer to the host.

    Returns:
        For each step its :attr:`StepResult.losses`, averaged over the ranks; and the router's statistics over all steps and ranks:
        counts summed, everything else averaged over micro batches.
    """
    stacked = torch.stack([result.losses for result in results])
    losses: list[list[float]] = (topology.all_reduce_sum(stacked) / topology.world_size).tolist()
    router: RouterTotals | None = None
    for result in results:
        router = _add(router, result.router)
    if router is None:
        return losses, None
    micro_batches = sum(result.micro_batches for result in results) * topology.world_size
    means = (
        torch.cat([router.losses_LJ, router.entropy_L[:, None], router.dropped_L[:, None]], dim=1)
        / micro_batches
    )
    packed = topology.all_reduce_sum(torch.cat([router.counts_LE, means], dim=1)).cpu()
    num_experts, num_losses = router.counts_LE.shape[1], router.losses_LJ.shape[1]
    counts_LE, losses_LJ, entropy_L1, dropped_L1 = packed.split(
        (num_experts, num_losses, 1, 1), dim=1
    )
    return losses, RouterTotals(losses_LJ, counts_LE, entropy_L1[:, 0], dropped_L1[:, 0])
