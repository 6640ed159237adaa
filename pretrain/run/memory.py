"""Memory of a rank in training, before a single tensor exists."""

from __future__ import annotations

from pretrain.config.recipe import TrainConfig
from pretrain.model.config import ModelConfig
from pretrain.model.sizes import ModelSize, attention_layers
from pretrain.optim.config import Optimizer


def state_bytes_per_rank(
    size: ModelSize,
    precision: str,
    zero_stage: int,
    world_size: int,
    ep_size: int,
    optimizer: Optimizer,
) -> dict[str, int]:
    """Return bytes of weights, gradients and optimizer state on one rank, without activations.

    ZeRO (Rajbhandari et al. 2020): stage 1 shards the optimizer state over the ranks that hold the
    same weights, stage 2 also gradients, stage 3 also weights. Experts are replicated on world_size
    / ep_size ranks only.
    """
    # Bytes an element of weights and gradients, and of the fp32 master weights, which ZeRO keeps
    # in fp32 training too.
    width = _width(precision)
    master = _master_width(precision, zero_stage)
    parts = {"weights": 0.0, "gradients": 0.0, "optimizer": 0.0}
    if size.parameters_rows:
        # Tables of experts: fp32 weights, sharded over all ranks at stage 3; gradients of the rows
        # that a step uses only; moments sharded over all ranks at every stage.
        parts["weights"] += size.parameters_rows * 4 / (world_size if zero_stage == 3 else ep_size)
        moments = 0.0
        if optimizer.sparse_optimizer is not None:
            moments = optimizer.sparse_optimizer.matrix_state_bytes
        parts["optimizer"] += size.parameters_rows * moments / world_size
    for count, replicas, is_matrix in _trained(size, world_size, ep_size):
        # Bytes of optimizer state an element.
        state = optimizer.matrix_state_bytes if is_matrix else optimizer.other_state_bytes
        parts["weights"] += count * width / (replicas if zero_stage == 3 else 1)
        parts["gradients"] += count * width / (replicas if zero_stage >= 2 else 1)
        parts["optimizer"] += count * (state + master) / (replicas if zero_stage >= 1 else 1)
    return {name: int(value) for name, value in parts.items()} | {"total": int(sum(parts.values()))}


def start_bytes_per_rank(
    size: ModelSize,
    state: dict[str, int],
    precision: str,
    zero_stage: int,
    world_size: int,
    ep_size: int,
) -> dict[str, int]:
    """Return bytes of one rank at the two peaks of its start, before its first step.

    ``built``: its weights, and two tensors: one of its parameters whole, and one that a random
    stream or a file fills, in fp32. ``handed_over``: its weights, its fp32 master weights, and what
    DeepSpeed has at the same time: gradients in fp32, and at stage 0 moments too; at stage 3 a
    second copy of the largest group of master weights, and later its gradients.

    Args:
        state: what the rank holds in training, of :func:`state_bytes_per_rank`.
    """
    width = _width(precision)
    # At stage 3 in fp32, and at stage 0, DeepSpeed updates the weights themselves.
    master = 0 if precision == "fp32" and zero_stage in (0, 3) else 4
    groups = [
        int(count * master / (replicas if zero_stage >= 1 else 1))
        for count, replicas, _ in _trained(size, world_size, ep_size)
    ]
    masters = sum(groups)
    if zero_stage == 3:
        handed_over = masters + max(*groups, state["gradients"])
    elif zero_stage == 0 and master:
        handed_over = state["optimizer"] + masters
    else:
        handed_over = 2 * masters
    return {
        "built": state["weights"] + size.largest_tensor * (4 + width),
        "handed_over": state["weights"] + handed_over,
    }


def _width(precision: str) -> int:
    return 4 if precision == "fp32" else 2


def _master_width(precision: str, zero_stage: int) -> int:
    return 0 if precision == "fp32" and zero_stage == 0 else 4


def _trained(size: ModelSize, world_size: int, ep_size: int) -> list[tuple[float, float, bool]]:
    """Return what DeepSpeed trains on a rank, by the ranks that hold the same.

    Elements on this rank, how many ranks hold the same ones, and whether they are of matrices: what
    is on every rank, the parts of what ranks share, and experts.
    """
    others = size.parameters_stored - size.parameters_sharded - size.parameters_matrices
    sharded = (size.parameters_sharded - size.parameters_rows) / ep_size
    parts = size.tp_size
    return [
        (others - size.cut_others, world_size, False),
        (size.parameters_matrices - size.cut_matrices, world_size, True),
        (size.cut_others / parts, world_size / parts, False),
        (size.cut_matrices / parts, world_size / parts, True),
        (sharded, world_size / ep_size, True),
    ]


def activation_bytes(
    config: ModelConfig, train: TrainConfig, precision: str, sp_size: int = 1
) -> int:
    """Return roughly the bytes that one micro batch keeps for the backward pass.

    With activation checkpointing: the input of each block, and the working set of one block; with
    the selective one also what blocks keep of their products.

    Args:
        sp_size: ranks that share each sequence.
    """
    tokens = train.micro_batch_size * train.sequence_length // sp_size
    width = 4 if precision == "fp32" else 2
    # Elements that attention keeps of a token: scores' inputs, values, and what some kinds add.
    attention = (
        config.attention.score_dim + config.attention.value_dim + config.attention.trained_per_token
    )
    layers = attention_layers(config)
    per_layer = [
        tokens
        * width
        * (6 * config.hidden_size + 2 * attention + _kept_by_feed_forward(config, layer))
        for layer in layers
    ]
    blocks = sum(per_layer)
    if train.activation_checkpointing != "none":
        inputs = len(per_layer) * tokens * width * config.hidden_size
        products = 0
        if train.activation_checkpointing == "selective":
            # Queries, keys, values, attention's output, and the output projection's.
            of_attention = attention + config.attention.value_dim + config.hidden_size
            products = sum(
                tokens * width * (of_attention + _products_of_feed_forward(config, layer))
                for layer in layers
            )
        blocks = max(per_layer) + inputs + products
    # fp32 logits, their softmax and their gradient, of one chunk of tokens.
    logits = 3 * 4 * min(tokens, config.loss_chunk_tokens) * config.padded_vocab_size
    return blocks + logits


def _kept_by_feed_forward(config: ModelConfig, layer: int) -> int:
    """Return elements that a layer's feed-forward keeps of a token for the backward pass."""
    kept = config.feed_forward.kept_per_unit
    if config.moe is None or not config.layer_pattern.is_moe(layer):
        return kept * (config.intermediate_size or 0)
    return config.moe.kept_activations(config.hidden_size, kept)


def _products_of_feed_forward(config: ModelConfig, layer: int) -> int:
    """Return elements of the outputs of a layer's matrix products, a token."""
    # What is kept of a hidden unit but the activation and its dropout.
    products = config.feed_forward.kept_per_unit - 2
    if config.moe is None or not config.layer_pattern.is_moe(layer):
        return products * (config.intermediate_size or 0) + config.hidden_size
    return config.moe.kept_products(config.hidden_size, products)
