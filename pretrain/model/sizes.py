"""Parameters, FLOPs and memory of a model, before a single tensor exists."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import nn

from pretrain.config.recipe import TrainConfig
from pretrain.core.accelerators import accelerator_of_device
from pretrain.model.config import ModelConfig
from pretrain.model.decoder import DecoderLM
from pretrain.model.moe.config import PEER, DeepSpeedMoE
from pretrain.optim.config import Optimizer

# What a parameter belongs to: the first pattern that its name has.
COMPONENTS = {
    "embedding": re.compile(r"^embedding\."),
    "positions": re.compile(r"^position\."),
    "head": re.compile(r"^head\."),
    "multi_token_prediction": re.compile(r"^multi_token\."),
    "attention": re.compile(r"\.attention\."),
    "shared_experts": re.compile(
        r"\.feed_forward\.(shared|mlp|coefficient)\."
    ),  # the last two are DeepSpeed's residual expert and its mixing
    "routed_experts": re.compile(r"\.experts\.|\.feed_forward\.b[123]$"),
    "routers": re.compile(r"\.(router|gate|retrieval)\."),
    "dense_feed_forwards": re.compile(r"\.feed_forward\."),
    "norms": re.compile(r"norm\.(weight|bias)$"),
}
ROUTED = COMPONENTS["routed_experts"]
OUTSIDE_BLOCKS = ("embedding", "positions", "head")
STACKED_BIASES = re.compile(r"\.feed_forward\.b[123]$")
# Several rows that are no hidden matrix: each is a gate by itself, an expert's, the shared experts' or the residual expert's.
GATES = re.compile(r"\.(router|gate|retrieval|coefficient)\.")


@dataclass(frozen=True)
class ModelSize:
    """Attributes:
    parameters_total: weights and biases, without the rows that pad the vocabulary; a tied head is counted once.
    parameters_active: all but the routed experts, and top_k of those in each layer that routes.
    parameters_padding: the rows that pad the vocabulary.
    parameters_experts: routed experts, with their biases.
    parameters_sharded: those of them that ep_size ranks share; the biases of dropless experts stand on every rank.
    parameters_matrices: those that stand on every rank and are hidden matrices: not experts, embeddings, head, routers or vectors.
    parameters_rows: routed experts in tables of rows, trained in fp32 without a dense gradient (PEER).
    components: ``parameters_total`` by what they belong to; the block of multi-token prediction is one by itself.
    components_active: ``parameters_active`` likewise.
    flops_per_token: forward and backward: 6 a matrix weight that a token is multiplied with, and attention's scores and values.
    """

    parameters_total: int
    parameters_active: int
    parameters_padding: int
    parameters_experts: int
    parameters_sharded: int
    parameters_matrices: int
    parameters_rows: int
    components: dict[str, int]
    components_active: dict[str, int]
    flops_per_token: float

    @property
    def parameters_stored(self) -> int:
        """What is held in memory: padding too."""
        return self.parameters_total + self.parameters_padding


def model_size(config: ModelConfig, sequence_length: int) -> ModelSize:
    """Counts on the meta device: exact, and in seconds for any size.

    The model is built as one rank of many sees it, with a single routed expert a layer: DeepSpeed's native layer would copy each one.
    """
    num_experts, top_k = (
        (config.moe.total_experts, config.moe.experts_per_token) if config.moe else (1, 1)
    )
    with torch.device("meta"):
        model = DecoderLM(config, ep_size=num_experts)
    components, active = dict.fromkeys(COMPONENTS, 0), dict.fromkeys(COMPONENTS, 0)
    sharded = experts = products = matrices = 0
    for name, parameter in model.named_parameters():
        component, is_sharded = _component(name), not getattr(parameter, "allreduce", True)
        count = parameter.numel() * (num_experts if is_sharded else 1)
        used = count
        sharded += count if is_sharded else 0
        if ROUTED.search(name):
            experts, used = experts + count, count * top_k // num_experts
        components[component] += count
        active[component] += used
        if (
            parameter.dim() > 1
            and component not in OUTSIDE_BLOCKS
            and not STACKED_BIASES.search(name)
        ):
            if not is_sharded and not GATES.search(name):
                matrices += count
            # Sub-keys are multiplied with each head's query.
            products += used * (
                config.moe.num_heads
                if isinstance(config.moe, PEER) and ".retrieval.keys_" in name
                else 1
            )
    padding = _padding(model)
    for component, numbers in padding.items():
        components[component] -= numbers
        active[component] -= numbers
    return ModelSize(
        parameters_total=sum(components.values()),
        parameters_active=sum(active.values()),
        parameters_padding=sum(padding.values()),
        parameters_experts=experts,
        parameters_sharded=sharded,
        parameters_matrices=matrices,
        parameters_rows=experts if isinstance(config.moe, PEER) else 0,
        components=components,
        components_active=active,
        flops_per_token=6.0 * (products + _vocabulary_products(model))
        + _attention_flops(config, sequence_length),
    )


def _component(name: str) -> str:
    return next(component for component, pattern in COMPONENTS.items() if pattern.search(name))


def _padding(model: DecoderLM) -> dict[str, int]:
    """Numbers that pad the vocabulary, in the embedding and in a head of its own."""
    rows = model.config.padded_vocab_size - (model.config.vocab_size or 0)
    of_head = [
        parameter
        for parameter in model.head.parameters()
        if parameter is not model.embedding.weight
    ]
    return {
        "embedding": rows * model.embedding.size,
        "head": rows * sum(_row_size(parameter) for parameter in of_head),
    }


def _row_size(parameter: nn.Parameter) -> int:
    return parameter.numel() // parameter.shape[0]


def _vocabulary_products(model: DecoderLM) -> int:
    """Weights of embedding and head that a token is multiplied with: looking up a row is no product, and padding rows are not multiplied.

    Multi-token prediction goes through both a second time.
    """
    projection = 0 if model.embedding.projection is None else model.embedding.projection.numel()
    passes = 1 if model.multi_token is None else 2
    return passes * ((model.config.vocab_size or 0) * model.embedding.size + 2 * projection)


def _attention_layers(config: ModelConfig) -> list[int]:
    """The layer that each block of attention is made as, multi-token prediction's own block included."""
    layers = list(range(config.num_hidden_layers))
    return (
        layers if config.multi_token_prediction is None else [*layers, config.num_hidden_layers - 1]
    )


def _attention_flops(config: ModelConfig, sequence_length: int) -> float:
    """FLOPs a token of scores and of what they are multiplied with, forward and backward, averaged over a full sequence."""
    keys = 0.0
    for layer in _attention_layers(config):
        width = min(config.attention.window(layer) or sequence_length, sequence_length)
        # Query i (from 0) sees min(i + 1, width) keys.
        keys += (width * (width + 1) / 2 + (sequence_length - width) * width) / sequence_length
    return 6.0 * (config.attention.score_dim + config.attention.value_dim) * keys


def cache_bytes(config: ModelConfig, tokens: int, width: int) -> int:
    """What one sequence of ``tokens`` needs in the cache for generation, ``width`` bytes a number; a window layer needs no more than its window."""
    windows = (config.attention.window(layer) for layer in range(config.num_hidden_layers))
    return (
        sum(min(tokens, window or tokens) for window in windows)
        * config.attention.cached_per_token
        * width
    )


def state_bytes_per_rank(
    size: ModelSize,
    precision: str,
    zero_stage: int,
    world_size: int,
    ep_size: int,
    optimizer: Optimizer,
) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer state on one rank; activations come on top.

    ZeRO (Rajbhandari et al. 2020): stage 1 shards the optimizer state over the ranks that hold the same weights, stage 2 also gradients,
    stage 3 also weights. Experts are replicated on world_size / ep_size ranks only.
    """
    width = 4 if precision == "fp32" else 2
    master = 0 if precision == "fp32" and zero_stage == 0 else 4
    parts = {"weights": 0.0, "gradients": 0.0, "optimizer": 0.0}
    if size.parameters_rows:
        # Tables: fp32 weights, which all ranks share at stage 3; gradients of the rows used alone; moments always shared by all ranks.
        parts["weights"] += size.parameters_rows * 4 / (world_size if zero_stage == 3 else ep_size)
        moments = (
            optimizer.row_optimizer.matrix_state_bytes
            if optimizer.row_optimizer is not None
            else 0.0
        )
        parts["optimizer"] += size.parameters_rows * moments / world_size
    others = size.parameters_stored - size.parameters_sharded - size.parameters_matrices
    sharded = (size.parameters_sharded - size.parameters_rows) / ep_size
    for count, replicas, state in (
        (others, world_size, optimizer.other_state_bytes),
        (size.parameters_matrices, world_size, optimizer.matrix_state_bytes),
        (sharded, world_size / ep_size, optimizer.matrix_state_bytes),
    ):
        parts["weights"] += count * width / (replicas if zero_stage == 3 else 1)
        parts["gradients"] += count * width / (replicas if zero_stage >= 2 else 1)
        parts["optimizer"] += count * (state + master) / (replicas if zero_stage >= 1 else 1)
    return {name: int(value) for name, value in parts.items()} | {"total": int(sum(parts.values()))}


def activation_bytes(config: ModelConfig, train: TrainConfig, precision: str) -> int:
    """A rough count of what one micro batch keeps for the backward pass; with checkpointing one input a block, and one block's working set."""
    tokens = train.micro_batch_size * train.sequence_length
    width = 4 if precision == "fp32" else 2
    attention = (
        config.attention.score_dim + config.attention.value_dim + config.attention.trained_per_token
    )
    per_layer = [
        tokens
        * width
        * (6 * config.hidden_size + 2 * attention + _feed_forward_numbers(config, layer))
        for layer in _attention_layers(config)
    ]
    blocks = (
        max(per_layer) + len(per_layer) * tokens * width * config.hidden_size
        if train.activation_checkpointing
        else sum(per_layer)
    )
    logits = 3 * 4 * min(tokens, config.loss_chunk_tokens) * config.padded_vocab_size
    return blocks + logits


def _feed_forward_numbers(config: ModelConfig, layer: int) -> int:
    """Numbers that a layer's feed-forward keeps of a token: its first products, what they become, and that after dropout."""
    kind, moe = config.feed_forward.implementing_class(), config.moe
    kept = (2 if kind.gated else 1) * kind.expansion + 2
    if moe is None or not config.layer_pattern.is_moe(layer):
        return kept * (config.intermediate_size or 0)
    capacity = moe.capacity_factor if isinstance(moe, DeepSpeedMoE) and moe.drop_tokens else 1.0
    residual = (
        moe.moe_intermediate_size if isinstance(moe, DeepSpeedMoE) and moe.use_residual else 0
    )
    shared = kept * (moe.shared_width + residual)
    if isinstance(moe, PEER):
        # No row is copied: a token, its queries and the scores of its sub-keys, then a few numbers for each expert it takes.
        scores = moe.num_heads * (2 * moe.query_dim + sum(moe.product_key_sizes))
        return (
            shared
            + 2 * config.hidden_size
            + scores
            + moe.experts_per_token * ((kept + 1) * moe.moe_intermediate_size + 6)
        )
    return shared + int(
        moe.experts_per_token
        * capacity
        * (kept * moe.moe_intermediate_size + 4 * config.hidden_size)
    )


def peak_flops(device: torch.device, precision: str) -> float | None:
    """The device's bf16/fp16 peak, FLOP/s, for fp8 too; None if no data sheet is known."""
    if device.type != "cuda" or precision == "fp32":
        return None
    known = accelerator_of_device(torch.cuda.get_device_name(device))
    return None if known is None else known.bf16_flops
