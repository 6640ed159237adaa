"""Parameters and FLOPs of a model, before a single tensor exists."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import nn

from pretrain.core.accelerators import accelerator_of_device
from pretrain.model.config import ModelConfig, below_feed_forward
from pretrain.model.decoder import DecoderLM
from pretrain.model.moe.config import Role
from pretrain.model.tensor_shards import shard_of
from pretrain.model.token_parallel import TensorParallel, TokenParts

# What a parameter of an MoE layer belongs to; a residual expert sees every token as shared ones do.
MOE_COMPONENTS = {
    Role.SHARED_EXPERT: "shared_experts",
    Role.SHARED_GATE: "shared_experts",
    Role.RESIDUAL_EXPERT: "shared_experts",
    Role.RESIDUAL_GATE: "shared_experts",
    Role.EXPERT: "routed_experts",
    Role.EXPERT_BIAS: "routed_experts",
    Role.ROUTER: "routers",
}
# Components of all other parameters, by prefix and then by pattern; the first match counts. The
# whole block of multi-token prediction is one component.
OUTSIDE_BLOCKS = ("embedding", "positions", "head")
PREFIXES = {
    "embedding": "embedding.",
    "positions": "position.",
    "head": "head.",
    "multi_token_prediction": "multi_token.",
}
PATTERNS = {
    "attention": re.compile(r"\.attention\."),
    "dense_feed_forwards": re.compile(r"\.feed_forward\."),
    "norms": re.compile(r"norm\."),
}
# In the order of printed tables.
COMPONENTS = (
    *PREFIXES,
    "attention",
    "shared_experts",
    "routed_experts",
    "routers",
    "dense_feed_forwards",
    "norms",
)


@dataclass(frozen=True)
class ModelSize:
    """Parameter counts and FLOPs of a model.

    Attributes:
        parameters_total: weights and biases, without the rows that pad the vocabulary; a tied head
            is counted once.
        parameters_active: all but the routed experts, and top_k of those in each layer that routes.
        parameters_padding: the rows that pad the vocabulary.
        parameters_experts: routed experts, with their biases.
        parameters_sharded: those of them that ep_size ranks share; the biases of dropless experts
            are on every rank.
        parameters_matrices: hidden matrices that are on every rank: not experts, embeddings, head,
            routers or vectors.
        parameters_rows: routed experts in tables of rows, trained in fp32 without a dense gradient
            (PEER).
        cut_matrices, cut_others: of ``parameters_matrices``, and of the others that every rank has,
            those of which ranks that share tensors have a part each.
        tp_size: the number of these ranks.
        largest_tensor: elements of the largest tensor that is drawn or read at once when a model is
            built: a parameter, or of stacked experts one expert's.
        components: ``parameters_total`` by component; the block of multi-token prediction is one.
        components_active: ``parameters_active`` likewise.
        flops_per_token: forward and backward: 6 per matrix weight that a token is multiplied with,
            and attention's scores and values.
    """

    parameters_total: int
    parameters_active: int
    parameters_padding: int
    parameters_experts: int
    parameters_sharded: int
    parameters_matrices: int
    parameters_rows: int
    cut_matrices: int
    cut_others: int
    tp_size: int
    largest_tensor: int
    components: dict[str, int]
    components_active: dict[str, int]
    flops_per_token: float

    @property
    def parameters_stored(self) -> int:
        """Parameters in memory, padding included."""
        return self.parameters_total + self.parameters_padding


def model_size(config: ModelConfig, sequence_length: int, tp_size: int = 1) -> ModelSize:
    """Count on the meta device: exact, and in seconds for any size.

    The model is built as one rank of many sees it, with a single routed expert per layer:
    DeepSpeed's native layer would copy each one.
    """
    num_experts = config.total_experts
    top_k = 1 if config.moe is None else config.moe.experts_per_token
    with torch.device("meta"):
        model = DecoderLM(config, ep_size=num_experts)
    components = dict.fromkeys(COMPONENTS, 0)
    active = dict.fromkeys(COMPONENTS, 0)
    sharded = experts = products = matrices = largest = 0
    for name, parameter in model.named_parameters():
        component = _component(name, config)
        is_sharded = not getattr(parameter, "allreduce", True)
        role = config.moe_role(name)
        # allreduce=False is DeepSpeed's mark of expert parameters, of which this model has one in
        # num_experts.
        count = parameter.numel() * (num_experts if is_sharded else 1)
        used = count
        largest = max(largest, parameter.numel())
        sharded += count if is_sharded else 0
        if role in (Role.EXPERT, Role.EXPERT_BIAS):
            experts = experts + count
            used = count * top_k // num_experts
        components[component] += count
        active[component] += used
        is_vector = parameter.dim() == 1 or role is Role.EXPERT_BIAS
        # Embedding and head are counted apart: looking up a row is no product.
        if not is_vector and component not in OUTSIDE_BLOCKS:
            if not is_sharded and not (role is not None and role.is_gate):
                matrices += count
            products += used * _products_per_token(name, config)
    # Padding was counted with its tensors, and is taken off here.
    padding = _padding(model)
    for component, numbers in padding.items():
        components[component] -= numbers
        active[component] -= numbers
    # Last: it cuts the model.
    vocabulary_products = _vocabulary_products(model)
    cut_matrices, cut_others = _cut_parameters(model, tp_size)
    return ModelSize(
        parameters_total=sum(components.values()),
        parameters_active=sum(active.values()),
        parameters_padding=sum(padding.values()),
        parameters_experts=experts,
        parameters_sharded=sharded,
        parameters_matrices=matrices,
        parameters_rows=experts if config.moe is not None and config.moe.has_tables else 0,
        cut_matrices=cut_matrices,
        cut_others=cut_others,
        tp_size=tp_size,
        largest_tensor=largest,
        components=components,
        components_active=active,
        flops_per_token=6.0 * (products + vocabulary_products)
        + _attention_flops(config, sequence_length),
    )


def _component(name: str, config: ModelConfig) -> str:
    """The component a parameter belongs to, one of ``COMPONENTS``."""
    outside = next((one for one, start in PREFIXES.items() if name.startswith(start)), None)
    role = config.moe_role(name)
    if outside is not None or role is None:
        return outside or next(one for one, found in PATTERNS.items() if found.search(name))
    return MOE_COMPONENTS[role]


def _cut_parameters(model: DecoderLM, tp_size: int) -> tuple[int, int]:
    """Elements of hidden matrices, and of others, of which each of ``tp_size`` ranks has a part."""
    if tp_size == 1:
        return 0, 0
    # No group: nothing is computed.
    model.share(TokenParts("", 0, tp_size), None, TensorParallel("", 0, tp_size))
    matrices = others = 0
    for name, parameter in model.named_parameters():
        if shard_of(parameter) is None:
            continue
        elements = parameter.numel() * tp_size
        if parameter.dim() > 1 and _component(name, model.config) not in OUTSIDE_BLOCKS:
            matrices += elements
        else:
            others += elements
    return matrices, others


def _products_per_token(name: str, config: ModelConfig) -> int:
    """How many vectors of a token a matrix is multiplied with."""
    inner = below_feed_forward(name)
    return 1 if inner is None or config.moe is None else config.moe.products_per_token(inner)


def _padding(model: DecoderLM) -> dict[str, int]:
    """Elements that pad the vocabulary, in the embedding and in a head that is not tied to it."""
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
    """Weights of embedding and head that a token is multiplied with.

    Looking up a row is no product, and padding rows are not multiplied. Multi-token prediction uses
    both a second time.
    """
    projection = 0 if model.embedding.projection is None else model.embedding.projection.numel()
    passes = 1 if model.multi_token is None else 2
    return passes * ((model.config.vocab_size or 0) * model.embedding.size + 2 * projection)


def attention_layers(config: ModelConfig) -> list[int]:
    """The layer index that each attention block is built for, multi-token prediction's included."""
    layers = list(range(config.num_hidden_layers))
    return (
        layers if config.multi_token_prediction is None else [*layers, config.num_hidden_layers - 1]
    )


def _attention_flops(config: ModelConfig, sequence_length: int) -> float:
    """FLOPs per token of scores and values, forward and backward, averaged over a full sequence."""
    keys = 0.0
    for layer in attention_layers(config):
        width = min(config.attention.window(layer) or sequence_length, sequence_length)
        # Query i (from 0) sees min(i + 1, width) keys.
        keys += (width * (width + 1) / 2 + (sequence_length - width) * width) / sequence_length
    return 6.0 * (config.attention.score_dim + config.attention.value_dim) * keys


def cache_bytes(config: ModelConfig, tokens: int, width: int) -> int:
    """Bytes of one sequence of ``tokens`` in the cache for generation, ``width`` bytes per element.

    A layer with a sliding window needs no more than its window.
    """
    windows = (config.attention.window(layer) for layer in range(config.num_hidden_layers))
    return (
        sum(min(tokens, window or tokens) for window in windows)
        * config.attention.cached_per_token
        * width
    )


def peak_flops(device: torch.device, precision: str) -> float | None:
    """The device's bf16/fp16 peak in FLOP/s, also for fp8; None if no data sheet is known."""
    if device.type != "cuda" or precision == "fp32":
        return None
    known = accelerator_of_device(torch.cuda.get_device_name(device))
    return None if known is None else known.bf16_flops
