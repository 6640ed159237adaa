"""The rules for ranks that share sequences and tensors."""

from __future__ import annotations

from collections.abc import Iterator

from pretrain.config.recipe import Recipe
from pretrain.core.errors import ConfigError
from pretrain.model.attention.config import GroupedQueryAttentionConfig


def sequence_is_shared_evenly(recipe: Recipe) -> None:
    """Each rank must have as many tokens and heads as the others."""
    sp_size, tp_size = recipe.parallel.sp_size, recipe.parallel.tp_size
    parts = recipe.parallel.token_parts
    if parts == 1:
        return
    fields = [
        f"parallel.{name}_size" for name, size in (("sp", sp_size), ("tp", tp_size)) if size > 1
    ]
    shared = f"{' x '.join(fields)} ({parts})"
    length = recipe.train.sequence_length
    if length % parts:
        raise ConfigError(
            f"{shared} does not divide train.sequence_length ({length}): change one of them"
        )
    heads = recipe.model.attention.num_attention_heads
    if heads % parts:
        raise ConfigError(
            f"{shared} does not divide model.attention.num_attention_heads ({heads}), of which "
            "each rank computes a part: choose a divisor"
        )
    key_heads = recipe.model.attention.trained_key_heads
    # Of tensors first, then of sequences.
    for field, size in (("tp", tp_size), ("sp", sp_size)):
        if key_heads % size and size % key_heads:
            raise ConfigError(
                f"parallel.{field}_size ({size}) neither divides the {key_heads} key heads of "
                "model.attention that it shares nor is a multiple of them: each rank computes as "
                "many as the others, or a copy of one"
            )
        key_heads = max(key_heads // size, 1)


def tensors_can_be_cut(recipe: Recipe) -> None:
    """What tensor parallelism cuts must have equal parts, and be trained by elements."""
    size = recipe.parallel.tp_size
    if size == 1:
        return
    for reason in _why_not_cut(recipe):
        raise ConfigError(f"parallel.tp_size is {size}, but {reason}")


def _why_not_cut(recipe: Recipe) -> Iterator[str]:
    """Yield reasons, each with a way out."""
    model, size = recipe.model, recipe.parallel.tp_size
    moe, attention, optimizer = model.moe, model.attention, recipe.optimizer
    # DeepSpeed reduces shards as experts of its layers, and looks for these layers.
    if moe is None or not model.moe_layers or moe.has_tables:
        yield (
            "the model has no MoE layer of kind dropless or deepspeed, for which alone DeepSpeed "
            "reduces gradients over groups: use parallel.sp_size"
        )
        return
    if optimizer.needs_whole_matrices or optimizer.has_codes:
        yield (
            f"optimizer.kind={optimizer.kind} does not treat the elements of a tensor one by one: "
            "use adamw, lion or sgd"
        )
    if isinstance(attention, GroupedQueryAttentionConfig) and attention.qk_norm == "full":
        yield (
            "model.attention.qk_norm=full norms all heads together, which are on several ranks: "
            "use parallel.sp_size"
        )
    if recipe.train.precision == "fp8":
        yield "train.precision=fp8 has scales of whole tensors: use bf16"
    sizes = {}
    if len(model.moe_layers) < model.num_hidden_layers:
        sizes["model.intermediate_size"] = model.intermediate_size or 0
    if moe.num_shared_experts:
        sizes["the joint width of the shared experts"] = moe.shared_width
    for field, width in sizes.items():
        if width % size:
            yield f"it does not divide {field} ({width}): choose a divisor"
    # Not known before the tokenizer is there.
    if model.vocab_size is None:
        return
    if model.padded_vocab_size % size:
        yield (
            f"it does not divide the vocabulary of {model.padded_vocab_size} rows: make "
            f"model.vocab_multiple ({model.vocab_multiple}) a multiple of it"
        )
    elif model.padded_vocab_size - model.padded_vocab_size // size >= model.vocab_size:
        yield "the last rank's part of the vocabulary is padding alone: lower model.vocab_multiple"
