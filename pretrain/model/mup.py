"""Maximal update parametrization (muP): how weights and learning rates scale with the width.

muP has many forms that train alike, because Adam's step does not change with the size of a
gradient: a factor s in front of a weight may be left out if the weight starts s times as large and
its learning rate is multiplied by s (Yang et al. 2022, "Tensor Programs V", lemma J.1). Here every
such factor is left out, so the forward pass stays the same and exports need to know nothing. With r
= width / width at the base, r_in of a matrix's input dimension and r_out of its output dimension
(table 3, Adam):

 =====================================================  ======================  ===============
 parameter                                              initial size            learning rate
 =====================================================  ======================  ===============
 hidden matrix, experts' included: both grow            1 / sqrt(r_in)          1 / r_in
 output, such as head and router: r_out = 1             1 / r_in                1 / r_in
 input: r_in = 1; embeddings, norms, biases, sinks      1                       1
 final norm of a tied or factorised head                1 / r of hidden_size    the same
 queries (or their norm, if they have one)              times 1 / sqrt(r) of head_dim, both
 =====================================================  ======================  ===============

The last two replace the factor 1 / r on logits and 1 / head_dim on scores. A router is an output,
because the number of experts does not grow with the width (Małaśnicki et al. 2025,
"mu-Parametrization for Mixture of Experts"); experts are hidden matrices of their own width. Weight
decay is divided by the factor of the learning rate, so that a weight shrinks as fast as at the
base.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from pretrain.model.config import ModelConfig
from pretrain.model.decoder import DecoderLM
from pretrain.model.moe.config import Role
from pretrain.model.widths import base_model, width_ratio

# Their input dimension is the vocabulary or the position, which does not grow.
INPUTS = ("embedding.", "position.")


class WidthScale(NamedTuple):
    """Factors of a parameter's initial values and of its learning rate."""

    size: float
    learning_rate: float


UNCHANGED = WidthScale(1.0, 1.0)


def scale_of(name: str, config: ModelConfig, scales: dict[str, WidthScale]) -> WidthScale:
    """The scale of a parameter, by its name in the model.

    Args:
        scales: :func:`width_scales` of the model.
    """
    return scales.get(_first_expert(name, config), UNCHANGED)


def mark_learning_rates(model: DecoderLM, scales: dict[str, WidthScale]) -> None:
    """Mark parameters with their ``learning_rate_scale``, which the optimizer's groups read.

    The mark is left out if it is 1.
    """
    for name, parameter in model.named_parameters():
        factor = scale_of(name, model.config, scales).learning_rate
        if factor != 1.0:
            parameter.learning_rate_scale = factor  # type: ignore[attr-defined]


def width_scales(config: ModelConfig) -> dict[str, WidthScale]:
    """The scale of each parameter by name, without those that are as at the base.

    All experts with tensors of their own share the name of the first one.
    """
    widths = config.initialization.base_widths
    if widths is None:
        return {}
    base = base_model(config, widths)
    shapes = _shapes(config)
    base_shapes = _shapes(base)
    scales = {
        name: _of_shape(name, shape, base_shapes[name], config) for name, shape in shapes.items()
    }
    # A tied head is an embedding too, and cannot be scaled: the norm before it takes its factor.
    if config.tie_word_embeddings or config.embedding_size is not None:
        scales |= {
            name: WidthScale(1 / width_ratio(config), 1 / width_ratio(config))
            for name in shapes
            if name.startswith("final_norm.")
        }
    # The model divides scores by sqrt(head_dim); this factor makes that muP's 1 / head_dim.
    factor = (base.attention.query_width / config.attention.query_width) ** 0.5
    queries = tuple(f".attention.{name}" for name in config.attention.query_scales)
    scales |= {
        name: WidthScale(*(factor * part for part in scales[name]))
        for name in shapes
        if name.endswith(queries)
    }
    return {name: scale for name, scale in scales.items() if scale != UNCHANGED}


def _of_shape(name: str, shape: torch.Size, base: torch.Size, config: ModelConfig) -> WidthScale:
    if (
        len(shape) == 1
        or name.startswith(INPUTS)
        or config.moe_role(name) is Role.EXPERT_BIAS
        or shape[-1] == base[-1]
    ):
        return UNCHANGED
    # Weights are [out, in]: the last dimension is the fan-in.
    fan_in = shape[-1] / base[-1]
    return WidthScale(1 / fan_in if shape[-2] == base[-2] else fan_in**-0.5, 1 / fan_in)


def _shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Parameter shapes of a model with a single expert per layer.

    DeepSpeed's native layer would copy each expert, and all have one shape.
    """
    with torch.device("meta"):
        model = DecoderLM(config, ep_size=config.total_experts)
    return {
        _first_expert(name, config): parameter.shape for name, parameter in model.named_parameters()
    }


def _first_expert(name: str, config: ModelConfig) -> str:
    return name if config.moe is None else config.moe.renumbered(name, lambda _: 0)
