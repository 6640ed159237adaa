"""The target ``custom``: a model class next to the weights, for recipes without an architecture."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from pretrain.config.differences import mark_of
from pretrain.core.files import JsonObject
from pretrain.core.section import Effect, Section
from pretrain.export.architectures.target import ExportTarget
from pretrain.export.name_map import Link, Links, is_left_out
from pretrain.model import config as model_schema
from pretrain.model.attention import config as attention_schema
from pretrain.model.config import ModelConfig, below_feed_forward
from pretrain.model.decoder import DecoderLM
from pretrain.model.moe import routers
from pretrain.model.moe.config import (
    EXPERT_NUMBER,
    DeepSpeedMoEConfig,
    DroplessMoEConfig,
    PEERConfig,
)
from pretrain.model.positions import config as position_schema

# As in the class, whose file needs transformers.
MODEL_TYPE = "moe_pretrain"
# Copied into the export as they are.
CLASS_FILES = tuple(sorted(Path(__file__).parent.glob("*_moe_pretrain.py")))
AUTO_MAP = {
    "AutoConfig": "configuration_moe_pretrain.MoePretrainConfig",
    "AutoModelForCausalLM": "modeling_moe_pretrain.MoePretrainForCausalLM",
}
# What the class computes: each kind of section, and the fields of it that config.json carries. A
# field that is neither here nor in RESOLVED is a reason against the export, unless the schema says
# that no finished model depends on it.
_SHARED_BY_ATTENTION = ("num_attention_heads", "bias", "sinks")
_SHARED_BY_ROUTERS = ("bias", "norm_topk_prob", "routed_scaling_factor", "groups")
_SHARED_BY_MOE = ("moe_intermediate_size", "shared_expert_gate")
_SHARED_BY_ROUTED = (*_SHARED_BY_MOE, "num_experts", "top_k", "router")
COMPUTED: dict[type[Section], tuple[str, ...]] = {
    ModelConfig: (
        *(
            "vocab_size",
            "embedding_size",
            "hidden_size",
            "num_hidden_layers",
            "intermediate_size",
            "max_position_embeddings",
            "initializer_range",
        ),
        *(
            "norm_position",
            "final_norm",
            "tie_word_embeddings",
            "head_bias",
            "attention",
            "position",
            "norm",
            "feed_forward",
            "moe",
        ),
    ),
    model_schema.RMSNormConfig: ("eps",),
    model_schema.LayerNormConfig: ("eps",),
    position_schema.Rope: ("rope_theta",),
    position_schema.Yarn: (
        *("rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow"),
        *("attention_factor", "mscale", "mscale_all_dim", "truncate"),
    ),
    position_schema.Llama3: (
        "rope_theta",
        "factor",
        "original_max_position_embeddings",
        "low_freq_factor",
        "high_freq_factor",
    ),
    position_schema.Alibi: (),
    position_schema.RopeAlibi: ("rope_theta",),
    position_schema.Learned: (),
    position_schema.NoPositionConfig: (),
    model_schema.SwiGLUConfig: ("bias",),
    model_schema.GELUConfig: ("bias", "approximate"),
    model_schema.SiLUConfig: ("bias",),
    model_schema.ClampedSwiGLUConfig: ("bias", "limit", "alpha"),
    model_schema.ProductSwiGLUConfig: ("bias", "limit", "alpha"),
    attention_schema.GroupedQueryAttentionConfig: (
        *_SHARED_BY_ATTENTION,
        "num_key_value_heads",
        "head_dim",
        "qk_norm",
    ),
    attention_schema.MultiHeadLatentAttentionConfig: (
        *_SHARED_BY_ATTENTION,
        *(
            "q_lora_rank",
            "kv_lora_rank",
            "qk_rope_head_dim",
            "qk_nope_head_dim",
            "v_head_dim",
            "latent_norm",
        ),
    ),
    routers.SoftmaxTopK: (*_SHARED_BY_ROUTERS, "temperature"),
    routers.SigmoidTopK: _SHARED_BY_ROUTERS,
    routers.NoisyTopK: _SHARED_BY_ROUTERS,
    routers.ExpertGroups: ("num_groups", "top_k_groups", "score"),
    DroplessMoEConfig: _SHARED_BY_ROUTED,
    DeepSpeedMoEConfig: (
        *_SHARED_BY_ROUTED,
        "gate",
        "eval_capacity_factor",
        "min_capacity",
        "drop_tokens",
        "use_residual",
    ),
    PEERConfig: (
        *_SHARED_BY_MOE,
        "product_key_sizes",
        "num_heads",
        "top_k",
        "query_dim",
        "query_bias",
        "query_norm",
    ),
}
# What :meth:`Custom.config` and :meth:`Custom.reasons_against` look at themselves.
RESOLVED = {
    *(
        "layer_pattern",
        "sliding_window",
        "full_attention_every",
        "num_shared_experts",
        "shared_intermediate_size",
        "bias_balancing",
    ),
    *("use_rts", "top2_2nd_expert_sampling"),
}

# The class keeps our names but for these.
RENAMED = {
    "embedding.projection": "embedding_projection.weight",
    "feed_forward.mlp.": "feed_forward.residual.",
    "experts.up.weight": "experts.up_rows",
    "experts.gate.weight": "experts.gate_rows",
    "experts.down.weight": "experts.down_rows",
    "retrieval.keys_": "retrieval.keys.",
    "retrieval.norm.statistics.": "retrieval.norm.running_",
}
# fp32 whatever the others are: what our model never casts.
EXACT = (".balance_bias", ".retrieval.norm.running_mean", ".retrieval.norm.running_variance")
VOCABULARY = ("embedding.weight", "head.weight", "head.bias")


class Custom(ExportTarget):
    """The last target that is tried: its class opens with ``trust_remote_code=True`` only."""

    name = "custom"
    architecture = AUTO_MAP["AutoModelForCausalLM"].split(".")[1]
    files = tuple(map(str, CLASS_FILES))
    keeps_factors = True
    order = 1000  # behind everything that opens without trust_remote_code

    def reasons_against(self, model: ModelConfig) -> list[str]:
        """The reasons why the class cannot compute ``model``, a clause each; empty if it can."""
        reasons = _unknown(model, "model")
        return reasons + ([] if model.moe is None else model.moe.random_at_inference)

    def config(self, model: ModelConfig, eod_id: int) -> JsonObject:
        """``config.json``, but the weights' dtype."""
        config = _content(model) | {
            "model_type": MODEL_TYPE,
            "auto_map": AUTO_MAP,
            "sliding_windows": [
                model.attention.window(layer) for layer in range(model.num_hidden_layers)
            ],
            "moe_layers": model.moe_layers,
            "bos_token_id": eod_id,
            "eos_token_id": eod_id,
        }
        if model.moe is not None:
            config["moe"]["shared_intermediate_size"] = model.moe.shared_width
            if (routing := model.moe.routing) is not None:
                config["moe"]["bias_balancing"] = routing.bias_balancing is not None
        return config

    def links(self, model: ModelConfig) -> Links:
        """A link for each tensor of the export; what only training reads is left out."""
        with torch.device("meta"):
            names = [
                name
                for name in DecoderLM(model).state_dict()
                if name != "head.weight" or not model.tie_word_embeddings
            ]
        parts: dict[str, list[str]] = {}
        for name in names:
            if not is_left_out(name):
                parts.setdefault(_their_name(name, model), []).append(name)
        return [link for theirs, ours in parts.items() for link in _links_of(theirs, ours, model)]


def _links_of(theirs: str, ours: list[str], model: ModelConfig) -> list[Link]:
    """Links of one tensor: to one of ours, to one for each expert, or to parts in a row."""
    place = _place_in_expert(ours[0], model)
    if place is not None and EXPERT_NUMBER in place.tensor:
        return [Link(name, theirs, their_expert=expert) for expert, name in enumerate(ours)]
    if len(ours) > 1:
        return [Link(name, theirs, part=(index, len(ours))) for index, name in enumerate(ours)]
    return [
        Link(
            ours[0],
            theirs,
            rows=model.vocab_size if theirs in VOCABULARY else None,
            exact=theirs.endswith(EXACT),
        )
    ]


class _Place(NamedTuple):
    """The place of a routed experts' parameter in a tensor of ours.

    Attributes:
        parameter: of a feed-forward, such as ``up_proj.weight``.
        tensor: the name below the layer, with ``{expert}`` if each expert has one.
    """

    parameter: str
    tensor: str


def _place_in_expert(name: str, model: ModelConfig) -> _Place | None:
    inner = below_feed_forward(name)
    if inner is None or model.routing is None:
        return None
    moe = model.routing
    places = moe.expert_tensors(model.feed_forward.parameter_names)
    by_first_expert = {
        tensor.replace(EXPERT_NUMBER, "0"): _Place(parameter, tensor)
        for parameter, tensors in places.items()
        for tensor in tensors
    }
    return by_first_expert.get(moe.renumbered(inner, lambda _: 0))


def _their_name(name: str, model: ModelConfig) -> str:
    """The export's name of a tensor; it has one tensor for a matrix of all experts of a layer."""
    inner = below_feed_forward(name)
    place = _place_in_expert(name, model)
    if inner is not None and place is not None:
        matrix = place.parameter.replace("_proj.bias", "_bias").removesuffix(".weight")
        return f"{name.removesuffix(inner)}experts.{matrix}"
    if inner is not None and model.moe is not None:
        name = name.removesuffix(inner) + model.moe.common_name(inner)
    for ours, theirs in RENAMED.items():
        name = name.replace(ours, theirs)
    return name


def _unknown(section: Section, path: str) -> list[str]:
    """Fields and kinds below ``path`` that the class does not know."""
    if type(section) not in COMPUTED:
        return [
            f"{path} is of kind {getattr(section, 'kind', type(section).__name__)}, which the class"
            " does not have"
        ]
    reasons = []
    for name, field in type(section).model_fields.items():
        if name in COMPUTED[type(section)]:
            value = getattr(section, name)
            reasons += _unknown(value, f"{path}.{name}") if isinstance(value, Section) else []
        elif (
            name != "kind"
            and name not in RESOLVED
            and mark_of(field, Effect.MEANING) is not Effect.NONE
        ):
            reasons.append(f"the class does not know {path}.{name}")
    return reasons


def _content(section: Section) -> JsonObject:
    """The section in ``config.json``: its kind, and the fields that the class reads."""
    kind = ("kind",) if "kind" in type(section).model_fields else ()
    values = {name: getattr(section, name) for name in (*kind, *COMPUTED[type(section)])}
    return {
        name: _content(value) if isinstance(value, Section) else value
        for name, value in values.items()
    }
