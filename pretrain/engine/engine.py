"""One training step on DeepSpeed's engine, correct at every ZeRO stage, world size and ep_size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypedDict

import torch

from data_pipeline.loading.batch import Batch
from pretrain.config.recipe import Recipe
from pretrain.config.timeline import Phase
from pretrain.core import faults
from pretrain.core.activity import ACTIVITY
from pretrain.core.files import JsonObject
from pretrain.core.seeds import derived_seed
from pretrain.engine.balance import BalanceBiases
from pretrain.engine.build import (
    WeightLoader,
    build_model,
    expert_shard,
    frozen_names,
    leave_compiler_out,
    stage_of,
    start_deepspeed,
)
from pretrain.engine.compile import chosen_form, compile_model
from pretrain.engine.expert_tables import ExpertTablesStep, take_expert_tables
from pretrain.engine.loss_scale import LossScale
from pretrain.engine.master_weights import MasterWeights
from pretrain.engine.monitor import Monitor
from pretrain.engine.phases import FrozenParameters
from pretrain.engine.precision import set_matmul_precision
from pretrain.engine.step import ShouldSkip, StepResult, StepTotals
from pretrain.engine.step_hooks import StepHook, Update
from pretrain.engine.topology import Topology
from pretrain.engine.usage import UsageCounter
from pretrain.engine.workarounds.batch_size_change import set_batch_sizes
from pretrain.engine.workarounds.norm_of_tables import count_in_norm
from pretrain.engine.workarounds.stage0_gradient_norm import Stage0Clipping
from pretrain.engine.workarounds.update_veto import UpdateVeto
from pretrain.model.attention.kernels.base import gpu_capability
from pretrain.model.decoder import TrainOutput
from pretrain.model.kernels.selection import set_fused_kernels
from pretrain.optim.param_groups import (
    build_optimizer,
    learning_rate_scale,
    parameter_groups,
    peak_learning_rates,
)


class EngineCounts(TypedDict):
    """What an engine counts next to weights and moments, as a checkpoint holds it.

    Attributes:
        loss_scale: of fp16; empty in other precisions.
    """

    steps: int
    samples: int
    skipped: int
    loss_scale: dict[str, float]


class Engine:
    """A model on its devices with its optimizer, driven step by step.

    Args:
        recipe: with ``model.vocab_size`` resolved.
        ds_config: resolved by :func:`pretrain.engine.ds_config.resolve_ds_config`.
        precision: ``fp32``, ``bf16``, ``fp16`` or ``fp8``.
        load_weights: of those tensors that do not start from random values.

    Attributes:
        recipe: of the whole run.
        phase_recipe: the recipe as it is in the phase that was entered last.
        compiled: what ``train.compile`` is on this device.
        usage: how often each expert was chosen.
        sparse_optimizer: trains the expert tables of a PEER model; None for other models.
        masters: the fp32 weights.
        before_update: is called in each step when all gradients are reduced; None for nothing.
    """

    def __init__(
        self,
        recipe: Recipe,
        ds_config: JsonObject,
        precision: str,
        topology: Topology,
        load_weights: WeightLoader | None = None,
    ) -> None:
        self.recipe = recipe
        self.phase_recipe = recipe
        self.topology = topology
        self.precision = precision
        self.zero_stage = stage_of(ds_config)
        set_matmul_precision(recipe.train.tf32)
        set_fused_kernels(recipe.train.fused_kernels)
        leave_compiler_out()
        # The order below matters: tables leave the model before DeepSpeed sees its parameters, and
        # all hooks are attached after DeepSpeed has built its optimizer.
        shard = expert_shard(recipe, topology, self.zero_stage)
        self.expert_part = shard.part
        self.expert_parts = shard.parts
        self.model = build_model(
            recipe, precision, shard, topology.device, load_weights, ds_config, topology
        )
        self._frozen_names = frozen_names(self.model, recipe.model, recipe.phases)
        self.sparse_optimizer = take_expert_tables(self.model, recipe, shard.parts, topology)
        # Weights are drawn from named streams, dropout and router noise from those of micro
        # batches. What else may draw must differ between ranks; checkpoints carry the generator.
        torch.manual_seed(recipe.seed + topology.rank)
        optimizer = build_optimizer(
            parameter_groups(self.model, recipe.model, recipe.optimizer), recipe.optimizer
        )
        self.deepspeed, self.optimizer = start_deepspeed(
            self.model, optimizer, ds_config, precision, topology.device
        )
        self.monitor = self.deepspeed.monitor = Monitor(
            ds_config, topology.is_main, lambda: self.counts()["samples"]
        )
        self.compiled = chosen_form(
            recipe.train.compile, topology.device.type, gpu_capability(), self.zero_stage
        )
        compile_model(self.model, self.compiled)
        self._peak_learning_rates = peak_learning_rates(recipe.optimizer)
        self.loss_scale = LossScale(self.optimizer, self.zero_stage, precision)
        self.masters = MasterWeights(self.optimizer, self.zero_stage, precision)
        self.usage = UsageCounter(self.model, topology)
        self.before_update: Callable[[], None] | None = None
        self._frozen: FrozenParameters | None = None
        if self._frozen_names:
            self._frozen = FrozenParameters(optimizer, self.masters.local_part)
        self._stage0: Stage0Clipping | None = None
        self._hooks = self._build_hooks()

    def _build_hooks(self) -> Sequence[StepHook]:
        """The parts of a step that DeepSpeed does not have, in the order they run."""
        max_norm = self.recipe.train.grad_clip
        # Every hook below patches DeepSpeed's gradient norm. The tables come first: the veto must
        # see the norm of the whole model.
        tables: list[ExpertTablesStep] = []
        if self.sparse_optimizer is not None:
            peak = self._peak_learning_rates["matrix"]
            tables.append(
                ExpertTablesStep(
                    self.sparse_optimizer,
                    self.model,
                    self.topology,
                    self.loss_scale,
                    peak,
                    max_norm,
                )
            )
            count_in_norm(self.optimizer, self.zero_stage, lambda: tables[0].norm)
        self.veto = UpdateVeto(self.optimizer, self.zero_stage)
        if self.zero_stage == 0:
            self._stage0 = Stage0Clipping(
                model=self.model,
                max_norm=max_norm,
                precision=self.precision,
                loss_scale=self.loss_scale,
                veto=self.veto,
                tables_norm=lambda: tables[0].norm if tables else torch.zeros(()),
            )
        stage0 = [] if self._stage0 is None else [self._stage0]
        balance = BalanceBiases(self.model, self._frozen, self.topology)
        return [*tables, *stage0, self.usage, balance]

    def enter(self, phase: Phase) -> None:
        """Start a phase: its batch sizes, positions and frozen parameters hold for the next steps.

        To be called between two steps, and again after a checkpoint was loaded.
        """
        before = self.phase_recipe
        self.phase_recipe = phase.recipe
        sizes = phase.recipe.train
        set_batch_sizes(
            self.deepspeed,
            sizes.micro_batch_size,
            sizes.global_batch_size // (sizes.micro_batch_size * self.topology.dp_size),
        )
        model = phase.recipe.model
        if model.position != before.model.position:
            # A phase keeps the kind and changes its options; learned positions have none, so no
            # trained tensor is replaced here.
            self.model.config = model
            self.model.position = model.position.implementing_class()(model)
        frozen = self._frozen_names.get(phase.number, set())
        if self._frozen is not None:
            self._frozen.freeze(
                [parameter for name, parameter in self.model.named_parameters() if name in frozen]
            )
        if self.sparse_optimizer is not None:
            self.sparse_optimizer.frozen = frozen & self.sparse_optimizer.tables.keys()

    def train_step(
        self,
        micro_batches: list[Batch],
        learning_rate_factor: float,
        balance_rate: float = 0.0,
        should_skip: ShouldSkip | None = None,
        after_backward: Callable[[int], None] | None = None,
    ) -> StepResult:
        """Forward and backward over this rank's micro batches, then one optimizer step.

        The loss of a step is the mean over all counted tokens of the global batch, however they are
        spread over micro batches and ranks, plus the mean of the micro batches' router losses.

        Args:
            learning_rate_factor: share of the peak learning rates.
            balance_rate: how far the routers' balancing biases move after the step, if they have
                any.
            should_skip: is asked before the update, on every rank alike, if the gradient is finite.
                It costs one small all-reduce per step.
            after_backward: is called with the index of each micro batch when its local gradients
                exist.
        """
        self._set_learning_rates(learning_rate_factor)
        self.deepspeed.train()
        batches = [batch.to(self.topology.device) for batch in micro_batches]
        # One divisor for all micro batches: a mean per micro batch would weigh tokens by how many
        # others theirs holds.
        normalizer = self._tokens_per_micro_batch(batches)
        fractions_LE = self._global_fractions(batches, normalizer)
        totals = StepTotals(self._num_losses(), len(batches), self.topology.device)
        self._begin_veto(should_skip, totals)
        for number, batch in enumerate(batches):
            ACTIVITY.tick()
            self._seed(number)
            output = self._forward(batch, normalizer, fractions_LE)
            loss = faults.poison("step.backward", output.loss)
            self.deepspeed.backward(self.loss_scale.for_backward(loss))
            if after_backward is not None:
                after_backward(number)
            totals.add_losses(output, normalizer)
            # DeepSpeed counts micro batches: it reduces gradients in the backward pass of the last
            # one and updates in its step(), which only advances the count before.
            if number == len(batches) - 1:
                faults.reached("step.update")
                if self.before_update is not None:
                    self.before_update()
                for hook in self._hooks:
                    hook.before_update()
            self.deepspeed.step()
            totals.add_router(output)
        # At stage 0 in fp32 DeepSpeed reports a step on withheld gradients as applied.
        applied = self.deepspeed.was_step_applied() and not self.veto.withheld
        update = Update(
            self._grad_norm(), applied, learning_rate_factor, balance_rate, totals.router
        )
        for hook in self._hooks:
            hook.after_update(update)
        return StepResult(
            losses=totals.losses,
            router=totals.router,
            micro_batches=len(batches),
            grad_norm=update.grad_norm,
            applied=applied,
            refused=self.veto.refused,
            micro_losses=tuple(totals.micro_losses),
        )

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> tuple[float, int]:
        """Summed negative log-likelihood in nats and counted tokens, over all ranks' batches.

        Every rank must pass equally many batches: experts are exchanged in each forward pass.
        """
        self.deepspeed.eval()
        # fp64: a sum of millions of fp32 losses would lose digits. On the device: reading a loss
        # here would synchronise in every batch.
        totals = torch.zeros(2, dtype=torch.float64, device=self.topology.device)
        for batch in batches:
            ACTIVITY.tick()
            moved = batch.to(self.topology.device)
            output = self._forward(moved, 1.0)
            counted = (self.model.own_tokens(moved.labels_BS) >= 0).sum()
            totals += torch.stack((output.nll.double(), counted.double()))
        nll, tokens = self.topology.all_reduce_sum(totals).tolist()
        return nll, int(tokens)

    def learning_rate(self) -> float:
        """The learning rate of matrices in the last step, at muP's base width."""
        return next(
            float(group["lr"]) / learning_rate_scale(group)
            for group in self.optimizer.param_groups
            if group["role"] == "matrix"
        )

    def weights_are_finite(self) -> bool:
        """Whether all weights are finite; the same result on every rank.

        Each rank checks its own part of a weight that ZeRO stage 3 has partitioned.
        """
        parts = [getattr(weight, "ds_tensor", weight) for weight in self.model.parameters()]
        finite = all(bool(part.isfinite().all()) for part in parts)
        if self.sparse_optimizer is not None:
            finite = finite and self.sparse_optimizer.is_finite()
        return not self.topology.any_rank(not finite)

    def counts(self) -> EngineCounts:
        """What is to be saved next to weights, moments and buffers."""
        return EngineCounts(
            steps=self.deepspeed.global_steps,
            # DeepSpeed takes the parts of a sequence on several ranks for one sample each.
            samples=self.deepspeed.global_samples // self.topology.token_parts,
            skipped=self.deepspeed.skipped_steps,
            loss_scale=self.loss_scale.state(),
        )

    def restore_counts(self, counts: EngineCounts) -> None:
        """Continue to count from a checkpoint's :meth:`counts`."""
        self.deepspeed.global_steps = counts["steps"]
        self.deepspeed.global_samples = counts["samples"] * self.topology.token_parts
        self.deepspeed.skipped_steps = counts["skipped"]
        self.loss_scale.load(counts["loss_scale"])

    def _set_learning_rates(self, factor: float) -> None:
        """Set each group's rate: the schedule is ours, DeepSpeed has no scheduler."""
        for group in self.optimizer.param_groups:
            peak = self._peak_learning_rates[group["role"]]
            group["lr"] = peak * learning_rate_scale(group) * factor

    def _begin_veto(self, should_skip: ShouldSkip | None, totals: StepTotals) -> None:
        """Give the veto of this step its question, over the means of all ranks."""
        if should_skip is None:
            self.veto.begin(None)
            return

        # Runs between the last backward pass and the update, when the totals are complete.
        def refuses(norm: float) -> bool:
            return should_skip(*self._over_ranks(totals.losses.cross_entropy, norm))

        self.veto.begin(refuses)

    def _over_ranks(self, loss: torch.Tensor, norm: float) -> tuple[float, float]:
        """The mean loss of all ranks, and the norm; equal to the last bit on every rank.

        A decision that differed between ranks would leave some of them waiting in a collective.
        """
        values = torch.stack((loss, torch.full_like(loss, norm)))
        means = self.topology.all_reduce_sum(values) / self.topology.world_size
        loss_mean, norm_mean = means.tolist()
        return loss_mean, norm_mean

    def _grad_norm(self) -> float:
        """The norm of the finished step before clipping; DeepSpeed has none if it was refused."""
        if self.veto.refused:
            return self.veto.norm
        if self._stage0 is not None and self._stage0.norm is not None:
            return float(self._stage0.norm)
        return float(self.deepspeed.get_global_grad_norm())

    def _num_losses(self) -> int:
        """Losses per step: see ``StepLosses.packed``."""
        return 2 if self.recipe.model.multi_token_prediction is None else 3

    def _forward(
        self,
        batch: Batch,
        normalizer: torch.Tensor | float,
        fractions_LE: torch.Tensor | None = None,
    ) -> TrainOutput:
        return forward(self.deepspeed, batch, normalizer, fractions_LE)

    def _tokens_per_micro_batch(self, batches: list[Batch]) -> torch.Tensor | float:
        """Counted tokens of the global batch / its micro batches: the divisor of each of them.

        Of ranks that share sequences, each has a micro batch of the tokens that are its own.
        """
        sizes = self.phase_recipe.train
        if not self.recipe.data.leaves_out_labels:
            tokens = sizes.micro_batch_size * sizes.sequence_length
            return float(tokens // self.topology.token_parts)
        own = [self.model.own_tokens(batch.labels_BS) for batch in batches]
        counted = torch.stack([(labels_BS >= 0).sum() for labels_BS in own]).sum()
        micro_batches = len(batches) * self.topology.world_size
        return (self.topology.all_reduce_sum(counted) / micro_batches).float()

    @torch.no_grad()
    def _seed(self, number: int) -> None:
        """Begin the random stream of this rank's micro batch ``number`` (from 0) of the step.

        It belongs to the micro batch of the global batch, so that dropout and router noise of a
        token are the same on any rank, and after any resume. Ranks that share its sequences draw
        different values.
        """
        topology, step = self.topology, self.deepspeed.global_steps
        micro_batch = topology.dp_rank + number * topology.dp_size
        part = f" part {topology.token_part}" if topology.token_parts > 1 else ""
        torch.manual_seed(
            derived_seed(f"{self.recipe.seed} micro batch {step} {micro_batch}{part}")
        )

    def _global_fractions(
        self, batches: list[Batch], normalizer: torch.Tensor | float
    ) -> torch.Tensor | None:
        """f_e over the whole global batch, [L, E], by one more forward pass over all of it.

        The loss is linear in f, so counting first makes it exact under gradient accumulation (Qiu
        et al. 2025, "Demons in the Detail").
        """
        moe = self.recipe.model.routing
        if moe is None or moe.balance_scope == "micro_batch":
            return None
        layers = self.recipe.model.routed_layers
        counts_LE = torch.zeros(len(layers), moe.num_experts, device=self.topology.device)
        for number, batch in enumerate(batches):
            self._seed(number)
            output = self._forward(batch, normalizer)
            assert output.router is not None
            counts_LE += output.router.counts_LE
        tokens = self.phase_recipe.train.tokens_per_step
        return self.topology.all_reduce_sum(counts_LE) / tokens


def forward(
    model: Callable[..., TrainOutput],
    batch: Batch,
    normalizer: torch.Tensor | float,
    fractions_LE: torch.Tensor | None = None,
) -> TrainOutput:
    """The losses of one micro batch, of a model or of DeepSpeed's engine around one."""
    return model(
        batch.input_ids_BS,
        batch.labels_BS,
        normalizer,
        batch.document_ids_BS,
        fractions_LE,
        batch.position_ids_BS,
        batch.max_documents,
    )
