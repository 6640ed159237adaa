"""Rules that cross a recipe's sections, one small function each, checked when a recipe is loaded."""

from __future__ import annotations

from collections.abc import Callable

from data_pipeline.config import BestFit, StandardInputSource, Temperature, TokenBudget, Weights
from pretrain.config.recipe import Recipe, TrainConfig
from pretrain.config.rules.phases import PHASE_RULES, phase_warnings
from pretrain.config.rules.routers import router_warnings
from pretrain.config.timeline import Timeline, recipe_in_phase
from pretrain.core.errors import ConfigError
from pretrain.core.section import Section
from pretrain.model.attention.config import GroupedQueryAttention
from pretrain.model.config import GELU, ModelConfig, SiLU
from pretrain.model.moe.config import PEER, DeepSpeedMoE, DroplessMoE, MoE
from pretrain.model.moe.routers import SoftmaxTopK
from pretrain.model.widths import base_fits_the_model, mup_knows_the_parts
from pretrain.optim.config import Muon


def heads_group_evenly(recipe: Recipe) -> None:
    attention = recipe.model.attention
    if (
        isinstance(attention, GroupedQueryAttention)
        and attention.num_attention_heads % attention.num_key_value_heads
    ):
        raise ConfigError(
            f"model.attention.num_attention_heads ({attention.num_attention_heads}) is no multiple of "
            f"num_key_value_heads ({attention.num_key_value_heads}): change one of them"
        )


def rotary_dim_is_even(recipe: Recipe) -> None:
    attention = recipe.model.attention
    size = attention.rotary_dim
    if recipe.model.position.rotary and size % 2:
        raise ConfigError(
            f"model.attention.{attention.rotary_field} ({size}) must be even: a rotary embedding turns pairs of numbers"
        )


# Forms of heads that not every kernel takes: values that are wider or narrower than keys, and more than 256 numbers.
WIDTHS = ("values_of_another_width", "heads_wider_than_256")
# What a kernel can compute beside plain causal attention in half precision.
KERNEL_FEATURES: dict[str, frozenset[str]] = {
    "reference": frozenset(
        {"sliding_window", "sinks", "alibi", "dropout", "document_mask", "fp32", *WIDTHS}
    ),
    "sdpa": frozenset(
        {"sliding_window", "sinks", "alibi", "dropout", "document_mask", "fp32", *WIDTHS}
    ),
    "flex": frozenset({"sliding_window", "sinks", "alibi", "document_mask", "fp32", *WIDTHS}),
    "flash": frozenset({"sliding_window", "alibi", "dropout"}),
}


def kernel_computes_the_recipe(recipe: Recipe) -> None:
    model, attention = recipe.model, recipe.model.attention
    asked = {
        "sliding_window": attention.sliding_window is not None,
        "sinks": attention.sinks,
        "alibi": model.position.alibi,
        "dropout": model.dropout.attention > 0,
        "document_mask": recipe.data.document_mask,
        "fp32": recipe.train.precision == "fp32",
        "values_of_another_width": attention.value_dim != attention.score_dim,
        "heads_wider_than_256": attention.widest_head > 256,
    }
    needed = {feature for feature, given in asked.items() if given}
    if missing := sorted(needed - KERNEL_FEATURES[attention.kernel]):
        able = " or ".join(name for name, features in KERNEL_FEATURES.items() if needed <= features)
        raise ConfigError(
            f"model.attention.kernel={attention.kernel} cannot compute {', '.join(missing)}: use {able}"
        )


def layers_have_their_sections(recipe: Recipe) -> None:
    model = recipe.model
    moe_layers = model.moe_layers
    if moe_layers and model.moe is None:
        raise ConfigError(
            "model.layer_pattern asks for MoE layers, but there is no model.moe: add it, or use layer_pattern.kind=all_dense"
        )
    if len(moe_layers) < model.num_hidden_layers and model.intermediate_size is None:
        raise ConfigError(
            "model.layer_pattern has dense layers, but model.intermediate_size is missing: set their width"
        )


def sequence_fits_positions(recipe: Recipe) -> None:
    if recipe.train.sequence_length > recipe.model.max_position_embeddings:
        raise ConfigError(
            f"train.sequence_length ({recipe.train.sequence_length}) is longer than model.max_position_embeddings "
            f"({recipe.model.max_position_embeddings}): lower the one or raise the other"
        )


def micro_batch_divides(recipe: Recipe) -> None:
    train = recipe.train
    if train.global_batch_size % train.micro_batch_size:
        raise ConfigError(
            f"train.global_batch_size ({train.global_batch_size}) is no multiple of "
            f"train.micro_batch_size ({train.micro_batch_size}): change one of them"
        )


def drops_are_causal(recipe: Recipe) -> None:
    """DeepSpeed's own gate ranks tokens across the whole micro batch.

    With top_k 1 and more than 2 the tokens kept are chosen over all positions at once, with top_k 2 all second choices queue behind all first
    choices: in each case a later token can push out an earlier one.
    """
    moe = recipe.model.moe
    if isinstance(moe, DeepSpeedMoE) and moe.gate == "deepspeed" and moe.drop_tokens and moe.causal:
        raise ConfigError(
            "model.moe with drop_tokens=true is not causal (a later token can take an earlier one's place in an expert): "
            "set model.moe.gate=router or model.moe.drop_tokens=false, or acknowledge it with model.moe.causal=false"
        )


def native_options_fit(recipe: Recipe) -> None:
    moe = recipe.model.moe
    if not isinstance(moe, DeepSpeedMoE):
        return
    if moe.gate == "router":
        given = [
            name
            for name in ("use_rts", "noisy_gate_policy", "top2_2nd_expert_sampling")
            if getattr(moe, name)
        ]
        if given:
            raise ConfigError(
                f"model.moe.{given[0]} belongs to DeepSpeed's own gate: set model.moe.gate=deepspeed, or leave it out"
            )
        return
    if moe.use_rts and moe.top_k != 1:
        raise ConfigError(
            f"model.moe.use_rts works with top_k=1 only, not {moe.top_k}: set model.moe.use_rts=false"
        )
    if moe.top2_2nd_expert_sampling and moe.top_k != 2:
        raise ConfigError(
            f"model.moe.top2_2nd_expert_sampling works with top_k=2 only, not {moe.top_k}: set it to false"
        )
    if moe.noisy_gate_policy == "RSample" and moe.top_k != 1:
        raise ConfigError(
            f"model.moe.noisy_gate_policy=RSample works with top_k=1 only, not {moe.top_k}: use Jitter or none"
        )
    plain = SoftmaxTopK(norm_topk_prob=moe.top_k > 1)
    if moe.router != plain or moe.bias_balancing is not None:
        given = [
            name
            for name in type(moe.router).model_fields
            if getattr(moe.router, name) != getattr(plain, name, None)
        ]
        what = (
            "model.moe.bias_balancing"
            if moe.router == plain
            else f"model.moe.router.{_setting(moe.router, given[0])}"
        )
        raise ConfigError(
            f"{what} does not go with DeepSpeed's own gate, which takes router kind softmax_topk with norm_topk_prob={plain.norm_topk_prob} "
            f"for top_k={moe.top_k} and nothing else: set model.moe.gate=router, or model.moe.kind=dropless"
        )


def _setting(section: Section, name: str) -> str:
    """A field as a recipe would set it; of a section, only the name."""
    value = getattr(section, name)
    return name if isinstance(value, Section) else f"{name}={value}"


def experts_divide(recipe: Recipe) -> None:
    moe, ep_size = recipe.model.moe, recipe.parallel.ep_size
    if ep_size > 1 and not recipe.model.moe_layers:
        raise ConfigError(
            f"parallel.ep_size is {ep_size}, but the model has no MoE layer: set parallel.ep_size=1"
        )
    if moe is not None and moe.total_experts % ep_size:
        raise ConfigError(
            f"parallel.ep_size ({ep_size}) does not divide {_experts_of(moe)}: choose a divisor"
        )


def _experts_of(moe: MoE) -> str:
    field = "product_key_sizes, whose product is" if isinstance(moe, PEER) else "num_experts"
    return f"model.moe.{field} ({moe.total_experts})"


def peer_options_fit(recipe: Recipe) -> None:
    moe, dropout = recipe.model.moe, recipe.model.dropout
    if isinstance(moe, PEER) and dropout.expert:
        raise ConfigError(
            f"model.dropout.expert={dropout.expert} does not go with model.moe.kind=peer, which never forms the answer of one expert: "
            "use model.dropout.feed_forward, which drops their hidden numbers"
        )
    if isinstance(moe, PEER) and recipe.model.moe_layers and recipe.optimizer.row_optimizer is None:
        raise ConfigError(
            f"optimizer.kind={recipe.optimizer.kind} does not go with model.moe.kind=peer, whose tables are trained row by row: "
            "use optimizer.kind=adamw, muon or sgd"
        )


def muon_sees_whole_matrices(recipe: Recipe) -> None:
    """Stacked experts that are not gated keep their first matrix as two halves, and Muon's update of two halves is not that of the whole."""
    model = recipe.model
    if (
        isinstance(recipe.optimizer, Muon)
        and isinstance(model.moe, DroplessMoE)
        and model.moe_layers
        and isinstance(model.feed_forward, GELU | SiLU)
    ):
        raise ConfigError(
            f"optimizer.kind=muon does not go with model.feed_forward.kind={model.feed_forward.kind} in experts of model.moe.kind=dropless, "
            "whose first matrix is kept in halves: use model.feed_forward.kind=swiglu, or model.moe.kind=deepspeed"
        )


def warmup_fits(recipe: Recipe) -> None:
    num_steps = Timeline(recipe).num_steps
    if recipe.schedule.warmup_steps > num_steps:
        raise ConfigError(
            f"schedule.warmup_steps ({recipe.schedule.warmup_steps}) is longer than the run ({num_steps} steps): lower it or raise train.train_tokens"
        )


def evaluations_meet_checkpoints(recipe: Recipe) -> None:
    evaluation, saved = recipe.evaluation, recipe.checkpoint.interval_steps
    if evaluation is None:
        return
    if evaluation.interval_steps is not None and evaluation.interval_steps % saved:
        raise ConfigError(
            f"evaluation.interval_steps ({evaluation.interval_steps}) is no multiple of checkpoint.interval_steps ({saved}), "
            "and only saved checkpoints are evaluated: change one of them"
        )
    if not (evaluation.heldout or evaluation.prompts or evaluation.tasks):
        raise ConfigError(
            "evaluation asks for nothing: set evaluation.heldout=true, give prompts or tasks, or leave the section out"
        )


def token_budget_fills_the_run(recipe: Recipe) -> None:
    mixture = recipe.data.mixture
    if (
        isinstance(mixture, TokenBudget)
        and (total := sum(mixture.tokens.values())) != recipe.train.train_tokens
    ):
        raise ConfigError(
            f"data.mixture.tokens add up to {total}, but train.train_tokens is {recipe.train.train_tokens}: make them equal"
        )


def streams_are_read_once(recipe: Recipe) -> None:
    data = recipe.data
    if not data.streaming:
        return
    cleaning = data.cleaning
    refused = {
        "data.corpora": data.corpora is not None,
        "data.packing.kind=best_fit": isinstance(data.packing, BestFit),
        "data.mixture.max_epochs": bool(data.mixture.max_epochs),
        "checkpoint.keep_epochs": recipe.checkpoint.keep_epochs,
        f"data.mixture.kind={data.mixture.kind}": isinstance(
            data.mixture, Temperature | TokenBudget
        ),
        "data.cleaning.exact_duplicates": cleaning.exact_duplicates,
        "data.cleaning.near_duplicates": cleaning.near_duplicates is not None,
        "a source of kind stdin": any(
            isinstance(source, StandardInputSource) for source in data.named_sources.values()
        ),
    }
    for what, given in refused.items():
        if given:
            raise ConfigError(
                f"data.streaming reads documents one by one and does not go with {what}: leave it out, or build shards"
            )
    if len(data.named_sources) > 1 and not isinstance(data.mixture, Weights):
        raise ConfigError(
            "data.streaming does not know how large its sources are: give their shares with data.mixture.kind=weights"
        )


def phases_can_run(recipe: Recipe) -> None:
    for phase in recipe.phases:
        now = recipe_in_phase(recipe, phase)
        for rule in (
            sequence_fits_positions,
            micro_batch_divides,
            rotary_dim_is_even,
            kernel_computes_the_recipe,
        ):
            try:
                rule(now)
            except ConfigError as error:
                raise ConfigError(f"phases.{phase.name}: {error}") from None


RULES: tuple[Callable[[Recipe], None], ...] = (
    heads_group_evenly,
    rotary_dim_is_even,
    kernel_computes_the_recipe,
    layers_have_their_sections,
    sequence_fits_positions,
    micro_batch_divides,
    drops_are_causal,
    native_options_fit,
    experts_divide,
    peer_options_fit,
    muon_sees_whole_matrices,
    base_fits_the_model,
    mup_knows_the_parts,
    *PHASE_RULES,
    phases_can_run,
    warmup_fits,
    evaluations_meet_checkpoints,
    token_budget_fills_the_run,
    streams_are_read_once,
)


def check_recipe(recipe: Recipe) -> None:
    """Raises :class:`ConfigError` with one sentence for the first rule that does not hold."""
    for rule in RULES:
        rule(recipe)


def warnings_about(recipe: Recipe) -> list[str]:
    """What a recipe may ask for and should know, a sentence each."""
    moe, found = recipe.model.moe, phase_warnings(recipe) + router_warnings(recipe.model)
    if isinstance(moe, PEER) and recipe.model.moe_layers and moe.query_norm == "batch_norm":
        found.append(
            "model.moe.query_norm=batch_norm norms queries by running statistics, in training too, which lag behind what the queries become: "
            "rms_norm and layer_norm need none"
        )
    return found


def check_topology(recipe: Recipe, world_size: int, zero_stage: int) -> int:
    """Checks what depends on the launch, in every phase, and returns the gradient accumulation steps outside of phases.

    Raises:
        ConfigError: where this recipe cannot run on ``world_size`` ranks with ``zero_stage``; the sentence says what to change.
    """
    ep_size, train = recipe.parallel.ep_size, recipe.train
    if world_size % ep_size:
        raise ConfigError(
            f"parallel.ep_size ({ep_size}) does not divide the number of ranks ({world_size}): "
            f"start a multiple of {ep_size} ranks, or pass --set parallel.ep_size={_largest_divisor(world_size, recipe.model)}"
        )
    shards = expert_shards(recipe, world_size, zero_stage)
    if (
        (moe := recipe.model.moe) is not None
        and recipe.model.moe_layers
        and moe.total_experts % shards
    ):
        raise ConfigError(
            f"ZeRO stage 3 spreads the experts over all {shards} ranks, which do not divide {_experts_of(moe)}: use ds_configs/zero2.json"
        )
    if isinstance(recipe.model.moe, DeepSpeedMoE) and recipe.model.moe_layers and zero_stage == 3:
        raise ConfigError(
            "model.moe.kind=deepspeed cannot run with ZeRO stage 3 (DeepSpeed refuses it): use ds_configs/zero2.json, or model.moe.kind=dropless"
        )
    if train.compile != "none" and zero_stage == 3:
        raise ConfigError(
            f"train.compile={train.compile} cannot run with ZeRO stage 3, which gathers weights inside what would be compiled: "
            "use ds_configs/zero2.json, or train.compile=none"
        )
    for phase in recipe.phases:
        _accumulation(recipe_in_phase(recipe, phase).train, world_size, f"phases.{phase.name}: ")
    return _accumulation(train, world_size)


def _accumulation(train: TrainConfig, world_size: int, where: str = "") -> int:
    ranks_per_pass = train.micro_batch_size * world_size
    if train.global_batch_size % ranks_per_pass:
        raise ConfigError(
            f"{where}train.global_batch_size ({train.global_batch_size}) is no multiple of "
            f"micro_batch_size x ranks ({train.micro_batch_size} x {world_size}): "
            "change the batch sizes or the number of ranks"
        )
    return train.global_batch_size // ranks_per_pass


def expert_shards(recipe: Recipe, world_size: int, zero_stage: int) -> int:
    """Ranks that share one set of experts: ep_size; of PEER's, whose tokens travel and not their weights, all of them at ZeRO stage 3."""
    return (
        world_size
        if isinstance(recipe.model.moe, PEER) and zero_stage == 3
        else recipe.parallel.ep_size
    )


def _largest_divisor(world_size: int, model: ModelConfig) -> int:
    experts = model.moe.total_experts if model.moe is not None else 1
    return max(
        size for size in range(1, world_size + 1) if world_size % size == 0 and experts % size == 0
    )
