"""What a run would be: sizes, memory, time and phases, before anything is started."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from pretrain.checkpoint.weights_only import tensor_shapes
from pretrain.config.recipe import Recipe, TrainConfig
from pretrain.config.rules.sections import kernel_demands
from pretrain.config.timeline import Timeline
from pretrain.core.files import JsonObject
from pretrain.engine.compile import chosen_form
from pretrain.engine.part_precision import PartPrecision, part_precisions
from pretrain.model.attention.kernels.base import chosen_kernel
from pretrain.model.sizes import ModelSize, model_size
from pretrain.optim.frozen import frozen_parameters
from pretrain.run.estimate import Estimate, Hardware, estimate_time
from pretrain.run.memory import activation_bytes, start_bytes_per_rank, state_bytes_per_rank
from pretrain.run.resolve import ResolvedConfig
from pretrain.training.schedules import run_learning_rate_factor


@dataclass(frozen=True)
class PhasePlan:
    """One phase of a plan.

    Attributes:
        first_learning_rate, last_learning_rate: of matrices, at its first and last step.
        position, mixture: the sections of the recipe that hold in it.
        frozen: patterns of what is not trained.
    """

    name: str
    tokens: int
    steps: int
    global_batch_size: int
    gradient_accumulation_steps: int
    sequence_length: int
    first_learning_rate: float
    last_learning_rate: float
    position: JsonObject
    mixture: JsonObject
    frozen: list[str]


@dataclass(frozen=True)
class Plan:
    """A run that is not started.

    Attributes:
        first_step: steps that a branch has of its parent run; they take no time.
        state_bytes: of weights, gradients and optimizer state on one rank, and their ``total``.
        start_bytes: on one rank at the peak of its start.
        activation_bytes: on one rank, in the phase that needs most.
        phases: empty for a run without phases.
        weight_notes: in what ``initial_weights`` differ from the recipe.
        formats: in which number format each part computes.
        attention_kernel, compiled: what the recipe's fields are on the GPU of the plan, or on this
            machine.
        has_length: false if the recipe gives its length in epochs, and there are no data to count
            them in; then steps, tokens, time and phases are not known.
    """

    config: ResolvedConfig
    size: ModelSize
    first_step: int
    state_bytes: dict[str, int]
    start_bytes: int
    activation_bytes: int
    hardware: Hardware
    estimate: Estimate
    phases: list[PhasePlan]
    weight_notes: list[str]
    formats: list[PartPrecision]
    attention_kernel: str
    compiled: str
    has_length: bool = True

    @property
    def accumulation_steps(self) -> int:
        """Micro batches of a rank in one step, outside of phases."""
        recipe = self.config.recipe
        return _accumulation_steps(recipe, recipe.train, self.config.world_size)

    def to_dict(self) -> JsonObject:
        """Return the plan as ``--json`` writes it."""
        config = self.config
        size = self.size
        gpu = self.hardware.gpu
        return {
            "recipe": config.recipe.model_dump(mode="json"),
            "ds_config": config.ds_config,
            "world_size": config.world_size,
            "zero_stage": config.zero_stage,
            "precision": config.recipe.train.precision,
            "attention_kernel": self.attention_kernel,
            "compiled": self.compiled,
            "number_formats": [asdict(part) for part in self.formats],
            "parameters_total": size.parameters_total,
            "parameters_active": size.parameters_active,
            "parameters_padding": size.parameters_padding,
            "components": size.components,
            "flops_per_token": size.flops_per_token,
            "steps": config.timeline.num_steps if self.has_length else None,
            "first_step": self.first_step,
            "train_tokens": config.timeline.num_tokens if self.has_length else None,
            "gradient_accumulation_steps": self.accumulation_steps,
            "state_bytes_per_rank": self.state_bytes,
            "start_bytes_per_rank": self.start_bytes,
            "activation_bytes_per_rank": self.activation_bytes,
            "gpu": None if gpu is None else asdict(gpu),
            "estimated_seconds": self.estimate.seconds,
            "estimate_basis": self.estimate.basis,
            "phases": [asdict(phase) for phase in self.phases],
            "initial_weights": self.weight_notes,
        }


def make_plan(
    config: ResolvedConfig, first_step: int, weight_notes: Sequence[str], hardware: Hardware
) -> Plan:
    """Plan a run.

    Args:
        hardware: the time is estimated for it.

    Raises:
        ConfigError: if a phase freezes what the model does not have.
    """
    recipe = config.recipe
    timeline = config.timeline
    precision = recipe.train.precision
    size = model_size(recipe.model, recipe.train.sequence_length, recipe.parallel.tp_size)
    # Phases do not change it: no parameter depends on batch or length.
    state_bytes = state_bytes_per_rank(
        size,
        precision,
        config.zero_stage,
        config.world_size,
        recipe.parallel.ep_size,
        recipe.optimizer,
    )
    start_bytes = start_bytes_per_rank(
        size,
        state_bytes,
        precision,
        config.zero_stage,
        config.world_size,
        recipe.parallel.ep_size,
    )
    # A phase of longer sequences may need more than the recipe outside of phases.
    activations = max(
        activation_bytes(recipe.model, phase.recipe.train, precision, recipe.parallel.token_parts)
        for phase in timeline.phases
    )
    # Only the steps ahead take time; a branch has the others from its parent run.
    tokens = timeline.num_tokens - timeline.tokens_after(first_step)
    estimate = estimate_time(
        recipe,
        hardware,
        world_size=config.world_size,
        tokens=tokens,
        flops_per_token=_flops_ahead(config, first_step) / tokens,
    )
    return Plan(
        config=config,
        size=size,
        first_step=first_step,
        state_bytes=state_bytes,
        start_bytes=max(start_bytes.values()),
        activation_bytes=activations,
        hardware=hardware,
        estimate=estimate,
        phases=plan_phases(recipe, timeline, config.world_size),
        weight_notes=list(weight_notes),
        formats=part_precisions(recipe.model, precision),
        attention_kernel=chosen_kernel(
            recipe.model.attention.kernel, kernel_demands(recipe), *hardware.device
        ),
        compiled=chosen_form(recipe.train.compile, *hardware.device, config.zero_stage),
    )


def without_length(plan: Plan) -> Plan:
    """Return a plan that was made with some length, without all that follows from it."""
    recipe = plan.config.recipe
    train = recipe.train.model_copy(update={"epoch_samples": None})
    config = replace(plan.config, recipe=recipe.model_copy(update={"train": train}))
    basis = f"not known before there are data in {recipe.data_path}"
    return replace(plan, config=config, estimate=Estimate(None, basis), phases=[], has_length=False)


def _flops_ahead(config: ResolvedConfig, first_step: int) -> float:
    """FLOPs of the steps from ``first_step`` on; attention costs more in longer sequences."""
    done = config.timeline.tokens_after(first_step)
    flops = 0.0
    for phase in config.timeline.phases:
        if phase.end_step <= first_step:
            continue
        # Of the phase that ``first_step`` is in, only the rest.
        tokens = min(phase.num_tokens, phase.first_tokens + phase.num_tokens - done)
        length = phase.recipe.train.sequence_length
        flops += model_size(config.recipe.model, length).flops_per_token * tokens
    return flops


def plan_phases(recipe: Recipe, timeline: Timeline, world_size: int) -> list[PhasePlan]:
    """Plan each phase; none for a run without phases.

    Raises:
        ConfigError: if a phase freezes what the model does not have.
    """
    if not recipe.phases:
        return []
    dense, experts = tensor_shapes(recipe.model)
    peak = recipe.optimizer.learning_rate
    plans = []
    for phase in timeline.phases:
        frozen_field = f"phases.{phase.name}.frozen"
        # Only for its errors: a training would meet them hours after its start.
        frozen_parameters([*dense, *experts], phase.frozen, recipe.model, frozen_field)
        first, last = (
            run_learning_rate_factor(step, timeline, recipe.schedule)
            for step in (phase.first_step, phase.end_step - 1)
        )
        train = phase.recipe.train
        plans.append(
            PhasePlan(
                name=phase.name,
                tokens=phase.num_tokens,
                steps=phase.num_steps,
                global_batch_size=train.global_batch_size,
                gradient_accumulation_steps=_accumulation_steps(recipe, train, world_size),
                sequence_length=train.sequence_length,
                first_learning_rate=first * peak,
                last_learning_rate=last * peak,
                position=phase.recipe.model.position.model_dump(mode="json", exclude_none=True),
                mixture=phase.recipe.data.mixture.model_dump(mode="json"),
                frozen=list(phase.frozen),
            )
        )
    return plans


def _accumulation_steps(recipe: Recipe, train: TrainConfig, world_size: int) -> int:
    dp_size = world_size // recipe.parallel.token_parts
    return train.global_batch_size // (train.micro_batch_size * dp_size)
