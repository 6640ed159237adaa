"""Rules that cross a recipe's sections, one small function each, which raises ConfigError.

They are checked when a recipe is loaded. A rule that a section can check alone is in its schema.
"""

from __future__ import annotations

from collections.abc import Callable

from pretrain.config.recipe import Recipe
from pretrain.config.rules.exchange import exchange_fits
from pretrain.config.rules.phases import PHASE_RULES, phase_warnings, phases_fill_the_run
from pretrain.config.rules.routers import router_warnings
from pretrain.config.rules.sequence import sequence_is_shared_evenly
from pretrain.config.rules.widths import base_fits_the_model, mup_knows_the_parts
from pretrain.config.timeline import (
    Timeline,
    has_known_length,
    length_field,
    recipe_in_phase,
)
from pretrain.core.errors import ConfigError
from pretrain.core.registry import kind_name, kinds_of
from pretrain.model.attention.kernels.config import Kernel, KernelDemands, kernel_section
from pretrain.model.config import ModelConfig


def heads_fit(recipe: Recipe) -> None:
    """Sizes of heads must fit together."""
    recipe.model.attention.check("model.attention")


# Elements of all heads, and experts of a layer: far above any model, and no product of them with
# the other sizes overflows 64 bits.
MOST_HEAD_ELEMENTS = 2**24
MOST_EXPERTS = 2**32


def sizes_can_be_counted(recipe: Recipe) -> None:
    """Products of sizes must be countable: each size alone is bounded by its field."""
    attention = recipe.model.attention
    for what, elements in (("score", attention.score_dim), ("value", attention.value_dim)):
        if elements > MOST_HEAD_ELEMENTS:
            raise ConfigError(
                f"model.attention has {elements} {what} elements in all heads, and no model has "
                f"more than {MOST_HEAD_ELEMENTS}: lower num_attention_heads or the heads' sizes"
            )
    moe = recipe.model.moe
    if moe is not None and moe.total_experts > MOST_EXPERTS:
        raise ConfigError(
            f"{moe.experts_field} are more experts in a layer than the {MOST_EXPERTS} that can be "
            "told apart: lower them"
        )


def rotary_dim_is_even(recipe: Recipe) -> None:
    """A rotary embedding must have pairs to rotate."""
    attention = recipe.model.attention
    size = attention.rotary_dim
    if recipe.model.position.rotary and size % 2:
        raise ConfigError(
            f"model.attention.{attention.rotary_field} ({size}) must be even: a rotary embedding "
            "rotates pairs of elements"
        )


def kernel_demands(recipe: Recipe) -> KernelDemands:
    """What the recipe needs of its attention kernel."""
    attention = recipe.model.attention
    return KernelDemands(
        sliding_window=attention.sliding_window is not None,
        sinks=attention.sinks,
        alibi=recipe.model.position.alibi,
        dropout=recipe.model.dropout.attention > 0,
        document_mask=recipe.data.document_mask,
        fp32=recipe.train.precision == "fp32",
        values_of_another_width=attention.value_dim != attention.score_dim,
        widest_head=attention.widest_head,
        trained_head=attention.trained_head,
        latents=attention.attended_latents,
    )


def kernel_computes_the_recipe(recipe: Recipe) -> None:
    """The attention kernel must support all that the recipe asks for."""
    attention = recipe.model.attention
    # Each kernel's section declares what it lacks, so a new kernel needs no change here.
    demands = kernel_demands(recipe)
    if missing := kernel_section(attention.kernel).lacks(demands):
        able = " or ".join(kind_name(kind) for kind in kinds_of(Kernel) if not kind.lacks(demands))
        raise ConfigError(
            f"model.attention.kernel={attention.kernel} cannot compute {', '.join(missing)}: use "
            f"{able}"
        )


def layers_have_their_sections(recipe: Recipe) -> None:
    """Each kind of layer must have its section."""
    model = recipe.model
    moe_layers = model.moe_layers
    # layer_pattern decides which layers are MoE, so only with it a section is missing.
    if moe_layers and model.moe is None:
        raise ConfigError(
            "model.layer_pattern asks for MoE layers, but there is no model.moe: add it, or use "
            "layer_pattern.kind=all_dense"
        )
    if len(moe_layers) < model.num_hidden_layers and model.intermediate_size is None:
        raise ConfigError(
            "model.layer_pattern has dense layers, but model.intermediate_size is missing: set "
            "their width"
        )


def sequence_fits_positions(recipe: Recipe) -> None:
    """Sequences must not be longer than the model's positions."""
    # Also for rotary embeddings, which need no such limit: exports declare it to their users.
    if recipe.train.sequence_length > recipe.model.max_position_embeddings:
        raise ConfigError(
            f"train.sequence_length ({recipe.train.sequence_length}) is longer than "
            f"model.max_position_embeddings ({recipe.model.max_position_embeddings}): lower the "
            "one or raise the other"
        )


def micro_batch_divides(recipe: Recipe) -> None:
    """A step must consist of whole micro batches."""
    train = recipe.train
    # Whether the ranks divide it too is known at the launch: see check_topology.
    if train.global_batch_size % train.micro_batch_size:
        raise ConfigError(
            f"train.global_batch_size ({train.global_batch_size}) is no multiple of "
            f"train.micro_batch_size ({train.micro_batch_size}): change one of them"
        )


def options_of_experts_fit(recipe: Recipe) -> None:
    """The fields of the MoE section must fit together."""
    if recipe.model.moe is not None:
        recipe.model.moe.check()


def experts_divide(recipe: Recipe) -> None:
    """Each of the ep_size ranks must have as many experts as the others."""
    moe = recipe.model.moe
    ep_size = recipe.parallel.ep_size
    # With ep_size > 1 DeepSpeed builds groups that a dense model would never use.
    if ep_size > 1 and not recipe.model.moe_layers:
        raise ConfigError(
            f"parallel.ep_size is {ep_size}, but the model has no MoE layer: set parallel.ep_size=1"
        )
    if moe is not None and ep_size > 1 and not moe.spreads_experts:
        raise ConfigError(
            f"parallel.ep_size is {ep_size}, but every rank has all experts of model.moe.kind"
            f" '{moe.kind}': set parallel.ep_size=1"
        )
    if moe is not None and moe.total_experts % ep_size:
        raise ConfigError(
            f"parallel.ep_size ({ep_size}) does not divide {moe.experts_field}: choose a divisor"
        )


def experts_go_with_dropout(recipe: Recipe) -> None:
    """Dropout on expert outputs needs experts that form them."""
    moe = recipe.model.moe
    dropout = recipe.model.dropout
    # Dropout of whole expert outputs needs a tensor of each expert's output.
    if moe is not None and dropout.expert and not moe.forms_expert_outputs:
        raise ConfigError(
            f"model.dropout.expert={dropout.expert} does not go with model.moe.kind={moe.kind}, "
            "which never forms the output of one expert: use model.dropout.feed_forward, which "
            "drops their hidden units"
        )


def optimizer_trains_tables(recipe: Recipe) -> None:
    """Tables of experts need an optimizer that updates single rows."""
    moe = recipe.model.moe
    optimizer = recipe.optimizer
    if moe is None or not recipe.model.moe_layers or not moe.has_tables:
        return
    if optimizer.sparse_optimizer is None:
        raise ConfigError(
            f"optimizer.kind={optimizer.kind} does not go with model.moe.kind={moe.kind}, whose "
            "tables are trained row by row: use optimizer.kind=adamw, muon or sgd"
        )


def optimizer_sees_whole_matrices(recipe: Recipe) -> None:
    """An optimizer like Muon, whose update depends on the whole matrix, must not get halves."""
    model = recipe.model
    routing = recipe.model.routing
    # Newton-Schulz of two halves is not that of the whole; elementwise optimizers do not care.
    if routing is None or not recipe.optimizer.needs_whole_matrices:
        return
    if not routing.keeps_matrices_whole(model.feed_forward.parameter_names):
        raise ConfigError(
            f"optimizer.kind={recipe.optimizer.kind} does not go with "
            f"model.feed_forward.kind={model.feed_forward.kind} in experts of "
            f"model.moe.kind={routing.kind}, whose first matrix is kept in halves: use "
            "model.feed_forward.kind=swiglu, or model.moe.kind=deepspeed"
        )


def warmup_fits(recipe: Recipe) -> None:
    """The warm-up must end within the run."""
    if not has_known_length(recipe):
        return
    num_steps = Timeline(recipe).num_steps
    if recipe.schedule.warmup_steps > num_steps:
        raise ConfigError(
            f"schedule.warmup_steps ({recipe.schedule.warmup_steps}) is longer than the run "
            f"({num_steps} steps): lower it or raise {length_field(recipe)}"
        )


def evaluations_meet_checkpoints(recipe: Recipe) -> None:
    """An evaluation needs a checkpoint at its step, and something to do."""
    evaluation = recipe.evaluation
    saved = recipe.checkpoint.interval_steps
    if evaluation is None:
        return
    if evaluation.interval_steps is not None and evaluation.interval_steps % saved:
        raise ConfigError(
            f"evaluation.interval_steps ({evaluation.interval_steps}) is no multiple of "
            f"checkpoint.interval_steps ({saved}), and only saved checkpoints are evaluated: "
            "change one of them"
        )
    if evaluation.code is not None and not evaluation.code.allow_execution:
        raise ConfigError(
            "evaluation.code runs programs that the model writes: allow it with --set "
            "evaluation.code.allow_execution=true, or leave evaluation.code out"
        )
    if not (evaluation.heldout or evaluation.prompts or evaluation.tasks or evaluation.code):
        raise ConfigError(
            "evaluation asks for nothing: set evaluation.heldout=true, give prompts, tasks or code, "
            "or leave the section out"
        )


def token_budget_fills_the_run(recipe: Recipe) -> None:
    """The tokens of a mixture must be those of the run."""
    # Two owners of one number: they must agree.
    total = recipe.data.mixture.total_tokens
    if total is not None and recipe.train.epochs is not None:
        raise ConfigError(
            "data.mixture.kind=tokens says how long the run is, and so does train.epochs: give "
            f"train.train_tokens={total} instead, or another kind of mixture"
        )
    if total is not None and total != recipe.train.train_tokens:
        raise ConfigError(
            f"data.mixture.tokens add up to {total}, but train.train_tokens is "
            f"{recipe.train.train_tokens}: make them equal"
        )


def streams_are_read_once(recipe: Recipe) -> None:
    """A stream must not need what only shards can do, such as reading twice."""
    data = recipe.data
    if not data.streaming:
        return
    if recipe.train.epochs is not None:
        raise ConfigError(
            "train.epochs needs the length of an epoch, which a stream (data.streaming) has not: "
            "give train.train_tokens, or build shards"
        )
    cleaning = data.cleaning
    # What needs a count of documents, a second pass, or a document's position in a finished file.
    refused = {
        "data.corpora": data.corpora is not None,
        "data.packing.kind=best_fit": data.packing.is_planned,
        "data.mixture.max_epochs": bool(data.mixture.max_epochs),
        "checkpoint.keep_epochs": recipe.checkpoint.keep_epochs,
        f"data.mixture.kind={data.mixture.kind}": not data.mixture.can_stream,
        "data.cleaning.exact_duplicates": cleaning.exact_duplicates,
        "data.cleaning.near_duplicates": cleaning.near_duplicates is not None,
        "a source of kind stdin": any(
            not source.can_be_read_again for source in data.named_sources.values()
        ),
    }
    for what, is_used in refused.items():
        if is_used:
            raise ConfigError(
                f"data.streaming reads documents one by one and does not go with {what}: leave it "
                "out, or build shards"
            )
    # Shards know how many tokens each source has; a stream learns it at its end.
    if len(data.training_sources) > 1 and not data.mixture.shares_are_given:
        raise ConfigError(
            "data.streaming does not know how large its sources are: give their shares with "
            "data.mixture.kind=weights"
        )
    if not data.training_sources:
        raise ConfigError(
            "every source has 'split: validation', so data.streaming has nothing to train on: "
            "name a source to train on"
        )
    if data.streaming_lanes is not None and recipe.train.global_batch_size % data.streaming_lanes:
        raise ConfigError(
            f"data.streaming_lanes ({data.streaming_lanes}) is no divisor of "
            f"train.global_batch_size ({recipe.train.global_batch_size}): choose one, or leave it "
            "out"
        )


def phases_can_run(recipe: Recipe) -> None:
    """The rules about sizes must hold in each phase too."""
    for phase in recipe.phases:
        now = recipe_in_phase(recipe, phase)
        for rule in (
            sequence_fits_positions,
            micro_batch_divides,
            rotary_dim_is_even,
            kernel_computes_the_recipe,
            sequence_is_shared_evenly,
        ):
            try:
                rule(now)
            except ConfigError as error:
                raise ConfigError(f"phases.{phase.name}: {error}") from None


# In this order: a later rule may rely on the earlier ones, such as on whole phases.
RULES: tuple[Callable[[Recipe], None], ...] = (
    heads_fit,
    sizes_can_be_counted,
    rotary_dim_is_even,
    kernel_computes_the_recipe,
    layers_have_their_sections,
    sequence_fits_positions,
    micro_batch_divides,
    sequence_is_shared_evenly,
    options_of_experts_fit,
    experts_divide,
    experts_go_with_dropout,
    exchange_fits,
    optimizer_trains_tables,
    optimizer_sees_whole_matrices,
    base_fits_the_model,
    mup_knows_the_parts,
    *PHASE_RULES,
    phases_can_run,
    warmup_fits,
    evaluations_meet_checkpoints,
    token_budget_fills_the_run,
    streams_are_read_once,
)

# What depends on the number of steps: checked again when the data say how long an epoch is.
LENGTH_RULES: tuple[Callable[[Recipe], None], ...] = (phases_fill_the_run, warmup_fits)


def check_recipe(recipe: Recipe) -> None:
    """Raise :class:`ConfigError` with one sentence for the first rule that does not hold."""
    for rule in RULES:
        rule(recipe)


def warnings_about(recipe: Recipe) -> list[str]:
    """Return sentences about a recipe that can run, but may not do what its author expects."""
    return phase_warnings(recipe) + router_warnings(recipe.model)


def check_topology(recipe: Recipe, world_size: int, zero_stage: int) -> int:
    """Check what depends on the launch, in every phase.

    Returns:
        The gradient accumulation steps outside of phases.

    Raises:
        ConfigError: if this recipe cannot run on ``world_size`` ranks with ``zero_stage``; the
            sentence says what to change.
    """
    ep_size = recipe.parallel.ep_size
    train = recipe.train
    if world_size % ep_size:
        raise ConfigError(
            f"parallel.ep_size ({ep_size}) does not divide the number of ranks ({world_size}): "
            f"start a multiple of {ep_size} ranks, or pass --set "
            f"parallel.ep_size={_largest_divisor(world_size, recipe.model)}"
        )
    sp_size = recipe.parallel.sp_size
    if world_size % sp_size:
        raise ConfigError(
            f"parallel.sp_size ({sp_size}) does not divide the number of ranks ({world_size}): "
            f"start a multiple of {sp_size} ranks"
        )
    # ZeRO 3 shards experts over all ranks, not only over those of one expert-parallel group.
    moe = recipe.model.moe
    if moe is not None and recipe.model.moe_layers:
        shards = expert_shards(recipe, world_size, zero_stage)
        if moe.total_experts % shards:
            raise ConfigError(
                f"ZeRO stage 3 spreads the experts over all {shards} ranks, which do not divide "
                f"{moe.experts_field}: use ds_configs/zero2.json"
            )
        if zero_stage not in moe.zero_stages:
            raise ConfigError(
                f"model.moe.kind={moe.kind} cannot run with ZeRO stage {zero_stage} (DeepSpeed "
                f"refuses it): use ds_configs/zero{max(moe.zero_stages)}.json, or "
                "model.moe.kind=dropless"
            )
    if train.compile in ("blocks", "all") and zero_stage == 3:
        raise ConfigError(
            f"train.compile={train.compile} cannot run with ZeRO stage 3, which gathers weights "
            "inside what would be compiled: use ds_configs/zero2.json, or train.compile=none"
        )
    for phase in recipe.phases:
        _accumulation(recipe_in_phase(recipe, phase), world_size, f"phases.{phase.name}: ")
    return _accumulation(recipe, world_size)


def _accumulation(recipe: Recipe, world_size: int, where: str = "") -> int:
    train, sp_size = recipe.train, recipe.parallel.sp_size
    sequences_per_pass = train.micro_batch_size * world_size // sp_size
    if train.global_batch_size % sequences_per_pass:
        shared = f" / sp_size ({sp_size})" if sp_size > 1 else ""
        raise ConfigError(
            f"{where}train.global_batch_size ({train.global_batch_size}) is no multiple of "
            f"micro_batch_size x ranks ({train.micro_batch_size} x {world_size}){shared}: "
            "change the batch sizes or the number of ranks"
        )
    return train.global_batch_size // sequences_per_pass


def expert_shards(recipe: Recipe, world_size: int, zero_stage: int) -> int:
    """Return the ranks that share one set of experts."""
    moe = recipe.model.moe
    ep_size = recipe.parallel.ep_size
    return ep_size if moe is None else moe.expert_shards(ep_size, world_size, zero_stage)


def _largest_divisor(world_size: int, model: ModelConfig) -> int:
    """Return the largest ep_size that divides ranks and experts."""
    # 1 divides everything, so there is always one.
    return max(
        size
        for size in range(1, world_size + 1)
        if world_size % size == 0 and model.total_experts % size == 0
    )
