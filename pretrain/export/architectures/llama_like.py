"""What most architectures of transformers share: Llama's tensor names and config fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pretrain.core.errors import ConfigError
from pretrain.core.files import JsonObject
from pretrain.export.architectures.rope import ROPE, position_section, rope_parameters
from pretrain.export.architectures.sections import grouped_query, rotary, routed
from pretrain.export.architectures.target import ExportTarget
from pretrain.export.features import ANY, Takes, reasons_against
from pretrain.export.name_map import Link, Links, Zeros, expand
from pretrain.model.config import ModelConfig
from pretrain.model.moe.config import RoutedMoE

VOCABULARY = {"embedding.weight": "model.embed_tokens.weight"}
HEAD = {"head.weight": "lm_head.weight"}
FINAL_NORM = {"final_norm.weight": "model.norm.weight"}
NORMS = {
    "layers.{layer}.attention_norm.weight": "model.layers.{layer}.input_layernorm.weight",
    "layers.{layer}.feed_forward_norm.weight": (
        "model.layers.{layer}.post_attention_layernorm.weight"
    ),
}
DENSE = {
    f"layers.{{layer}}.feed_forward.{name}": f"model.layers.{{layer}}.mlp.{name}"
    for name in ("gate_proj", "up_proj", "down_proj")
}
FEED_FORWARD = "layers.{layer}.feed_forward."
SHARED = "layers.{layer}.feed_forward.shared."

TRUNK: Takes = {
    "vocab_size": ANY,
    "vocab_multiple": ANY,
    "embedding_size": ANY,  # the export multiplies the two matrices
    "hidden_size": ANY,
    "num_hidden_layers": ANY,
    "intermediate_size": ANY,
    "max_position_embeddings": ANY,
    "tie_word_embeddings": ANY,
    "norm.kind": ("rms_norm",),
    "norm.eps": ANY,
    "norm_position": ("pre",),
    "final_norm": (True,),
    "feed_forward.kind": ("swiglu",),
    "feed_forward.bias": (False,),
    **ROPE,
    "layer_pattern.kind": ANY,  # see moe_layers
    "layer_pattern.n": ANY,
    "layer_pattern.k": ANY,
}
GROUPED_QUERY: Takes = {
    "attention.kind": ("gqa",),
    "attention.num_attention_heads": ANY,
    "attention.num_key_value_heads": ANY,
    "attention.head_dim": ANY,
    "attention.bias": ("none",),
    "attention.qk_norm": ("none",),
}
EXPERTS: Takes = {
    "moe.kind": ("dropless", "deepspeed"),
    "moe.num_experts": ANY,
    "moe.top_k": ANY,
    "moe.moe_intermediate_size": ANY,
    "moe.shared_intermediate_size": ANY,
    "moe.drop_tokens": (False,),
}
SOFTMAX: Takes = {**EXPERTS, "moe.router.kind": ("softmax_topk",), "moe.router.norm_topk_prob": ANY}


class LlamaLike(ExportTarget):
    """A decoder with Llama's names for everything but the experts.

    Attributes:
        takes: the fields of a recipe's model that the architecture supports, with their values.
        moe_layers: which layers may be mixtures of experts.
        moe: the name of a layer's mixture of experts.
        expert: the names of an expert's gate, up and down projections.
    """

    takes: ClassVar[Takes]
    moe_layers: ClassVar[Literal["none", "all", "prefix", "any"]]
    moe: ClassVar[str] = "mlp"
    expert: ClassVar[tuple[str, str, str]] = ("gate_proj", "up_proj", "down_proj")

    def reasons_against(self, model: ModelConfig) -> list[str]:
        """The reasons why this architecture cannot compute ``model``; empty if it can."""
        # Fields alone do not show a pattern of layers: it is checked in addition.
        reasons = reasons_against(model, self.takes, self.name)
        count = len(model.moe_layers)
        dense = model.num_hidden_layers - len(model.moe_layers)
        if self.moe_layers == "none" and count:
            reasons.append(f"{count} layers are mixtures of experts, and {self.name} has none")
        elif self.moe_layers != "none" and not count:
            reasons.append(f"no layer is a mixture of experts, and {self.name} is one")
        elif self.moe_layers == "all" and dense:
            reasons.append(
                f"{dense} layers are dense, and all of {self.name}'s are mixtures of experts"
            )
        elif self.moe_layers == "prefix" and model.moe_layers != list(
            range(dense, model.num_hidden_layers)
        ):
            reasons.append(
                f"dense layers are between mixtures of experts, and {self.name}'s come before them"
            )
        return reasons + self.further_reasons(model)

    def further_reasons(self, model: ModelConfig) -> list[str]:
        """Reasons that a list of fields and values cannot express."""
        return []

    def links(self, model: ModelConfig) -> Links:
        """A link for each tensor of the export; only called if there are no reasons against it."""
        layers = range(model.num_hidden_layers)
        dense = [layer for layer in layers if layer not in model.moe_layers]
        return [
            *expand(VOCABULARY, rows=model.vocab_size),
            *expand(NORMS, layers),
            *self.attention_links(model),
            *expand(_with_parameters(DENSE, model.feed_forward.bias), dense),
            *(self.moe_links(model) if model.moe_layers else ()),
            *expand(FINAL_NORM),
            *([] if model.tie_word_embeddings else expand(HEAD, rows=model.vocab_size)),
        ]

    def attention_links(self, model: ModelConfig) -> list[Link]:
        """The projections of attention, with their biases and norms."""
        attention = grouped_query(model)
        biased = {
            "none": (),
            "qkv": ("q_proj", "k_proj", "v_proj"),
            "all": ("q_proj", "k_proj", "v_proj", "o_proj"),
        }[attention.bias]
        names = [f"{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj")] + [
            f"{name}.bias" for name in biased
        ]
        names += [] if attention.qk_norm == "none" else ["q_norm.weight", "k_norm.weight"]
        templates = {
            f"layers.{{layer}}.attention.{name}": f"model.layers.{{layer}}.self_attn.{name}"
            for name in names
        }
        return expand(templates, range(model.num_hidden_layers))

    def moe_links(self, model: ModelConfig) -> Links:
        """Router and routed experts."""
        moe = routed(model)
        theirs = f"model.layers.{{layer}}.{self.moe}."
        names = [f"{theirs}experts.{{expert}}.{name}.weight" for name in self.expert]
        templates = {
            router_name(moe) + ".weight": f"{theirs}gate.weight",
            **dict(zip(expert_names(model), names, strict=True)),
        }
        return [*expand(templates, model.moe_layers, moe.num_experts)]

    def config(self, model: ModelConfig, eod_id: int) -> JsonObject:
        """The architecture's own fields of ``config.json``."""
        attention = model.attention
        position = rotary(model)
        rope = rope_parameters(position)
        fields = {
            "model_type": self.name,
            "vocab_size": model.vocab_size,
            "hidden_size": model.hidden_size,
            "intermediate_size": (
                model.intermediate_size or (model.moe.moe_intermediate_size if model.moe else None)
            ),
            "num_hidden_layers": model.num_hidden_layers,
            "num_attention_heads": attention.num_attention_heads,
            "hidden_act": "silu",
            "max_position_embeddings": model.max_position_embeddings,
            "initializer_range": model.initializer_range,
            "rms_norm_eps": model.norm.eps,
            "tie_word_embeddings": model.tie_word_embeddings,
            # Readers from before transformers 5 look for rope_theta and rope_scaling, and silently
            # use defaults if they are missing.
            "rope_parameters": rope,
            "rope_theta": position.rope_theta,
            **({} if rope["rope_type"] == "default" else {"rope_scaling": rope}),
            "attention_dropout": 0.0,
            "bos_token_id": eod_id,
            "eos_token_id": eod_id,
        }
        return fields | self.attention_config(model)

    def attention_config(self, model: ModelConfig) -> JsonObject:
        """The attention's fields of ``config.json``, besides the number of query heads."""
        attention = grouped_query(model)
        return {
            "num_key_value_heads": attention.num_key_value_heads,
            "head_dim": attention.head_dim,
        }

    def unread(self, config: Mapping[str, Any]) -> set[str]:
        """Fields without an effect on what transformers computes for this ``config``."""
        types = config.get("layer_types")
        return (
            {"sliding_window", "use_sliding_window"}
            if types and "sliding_attention" not in types
            else set()
        )

    def model_section(self, config: Mapping[str, Any]) -> JsonObject:
        """A recipe's model section, from all fields of transformers' config with its defaults.

        ``config[name]`` refuses a null, ``config.get(name)`` returns it, for fields in which it
        means something. What a recipe cannot express is found afterwards, by comparing
        :meth:`config` of the result with ``config``.
        """
        heads = config["num_attention_heads"]
        return {
            "vocab_size": config["vocab_size"],
            "hidden_size": config["hidden_size"],
            "num_hidden_layers": config["num_hidden_layers"],
            "intermediate_size": config["intermediate_size"],
            "max_position_embeddings": config["max_position_embeddings"],
            "attention": {
                "kind": "gqa",
                "num_attention_heads": heads,
                # Null means multi-head attention, as in transformers.
                "num_key_value_heads": config.get("num_key_value_heads") or heads,
                "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
            },
            "position": position_section(config),
            "norm": {"kind": "rms_norm", "eps": config["rms_norm_eps"]},
            "layer_pattern": {"kind": "all_dense" if self.moe_layers == "none" else "all_moe"},
            "tie_word_embeddings": config["tie_word_embeddings"],
            "initializer_range": config["initializer_range"],
        }


def router_name(moe: RoutedMoE) -> str:
    """The module that makes the router's logits."""
    return FEED_FORWARD + moe.router_matrix


def balance_bias_name(moe: RoutedMoE) -> str:
    """The buffer of balancing without a loss."""
    return FEED_FORWARD + moe.balance_bias


def expert_names(model: ModelConfig, parameter: str = "weight") -> list[str]:
    """Templates of the experts' gate, up and down projections, or of their biases."""
    places = routed(model).expert_tensors(model.feed_forward.parameter_names)
    # These architectures take only gated experts, whose matrices are single tensors.
    names = [places[f"{matrix}_proj.{parameter}"] for matrix in ("gate", "up", "down")]
    return [FEED_FORWARD + name for (name,) in names]


def shared_links(model: ModelConfig, theirs: str, down_scale: float = 1.0) -> list[Link]:
    """Links of the shared experts to one feed-forward at ``theirs``."""
    names = {
        f"{SHARED}feed_forward.{name}.weight": f"{theirs}.{name}.weight"
        for name in ("gate_proj", "up_proj")
    }
    down = {f"{SHARED}feed_forward.down_proj.weight": f"{theirs}.down_proj.weight"}
    return [*expand(names, model.moe_layers), *expand(down, model.moe_layers, scale=down_scale)]


def absent_shared_experts(model: ModelConfig, theirs: str) -> list[Zeros]:
    """Empty matrices of shared experts, as transformers' class misses them in files otherwise."""
    shapes = {
        "gate_proj": (0, model.hidden_size),
        "up_proj": (0, model.hidden_size),
        "down_proj": (model.hidden_size, 0),
    }
    return [
        Zeros(theirs.format(layer=layer) + f".{name}.weight", shape)
        for layer in model.moe_layers
        for name, shape in shapes.items()
    ]


def windowed_layers(model: ModelConfig) -> JsonObject:
    """``sliding_window`` and ``layer_types``, the fields about windows layer by layer."""
    windows = [model.attention.window(layer) for layer in range(model.num_hidden_layers)]
    types = ["full_attention" if window is None else "sliding_attention" for window in windows]
    return {"sliding_window": model.attention.sliding_window, "layer_types": types}


def window_section(config: Mapping[str, Any]) -> JsonObject:
    """The fields of a recipe's attention that ``layer_types`` mean.

    Raises:
        ConfigError: for a pattern that recipes do not have.
    """
    types = config["layer_types"]
    if "sliding_attention" not in types:
        return {}
    full = next((layer + 1 for layer, kind in enumerate(types) if kind == "full_attention"), None)
    pattern = [
        kind if full is None or (layer + 1) % full else "full_attention"
        for layer, kind in enumerate(types)
    ]
    if (
        pattern != types
        or full == 1
        or not {"full_attention", "sliding_attention"}.issuperset(types)
    ):
        windows = [layer for layer, kind in enumerate(types) if kind != "full_attention"]
        raise ConfigError(
            f"config.json's layer_types has windows in the layers {windows} of {len(types)}, and"
            " recipes know windows in all layers or in all but each n-th: it cannot be converted"
        )
    return {"sliding_window": config["sliding_window"], "full_attention_every": full}


def router_aux_loss_coef(model: ModelConfig) -> float:
    """transformers' coefficient of the load-balancing loss, for this project's ``aux_loss_weight``.

    Here the loss is the sum over L layers of E/k sum_e f_e p_e, which is 1 a layer when balanced.
    transformers' ``load_balancing_loss_func`` is E sum_e f_e p_e with f and p over the tokens of
    all layers together, which is k when balanced. With one layer both are equal after this
    conversion; with several they are if the experts of one index have the same share in all layers.
    """
    moe = routed(model)
    return rounded(moe.aux_loss_weight * len(model.moe_layers) / moe.top_k)


def aux_loss_weight(config: Mapping[str, Any], moe_layers: int) -> float:
    """The inverse of :func:`router_aux_loss_coef`."""
    return rounded(
        config["router_aux_loss_coef"] * config["num_experts_per_tok"] / max(moe_layers, 1)
    )


def rounded(weight: float) -> float:
    """The weight with twelve digits, so that there and back again is the same value."""
    return float(f"{weight:.12g}")


def dense_layers(config: Mapping[str, Any]) -> list[int]:
    """Layers without experts, by ``mlp_only_layers`` and ``decoder_sparse_step`` of Qwen."""
    if (step := config["decoder_sparse_step"]) < 1:
        raise ConfigError(
            f"config.json says decoder_sparse_step = {step}, and no layer is a multiple of that:"
            " give 1 or more"
        )
    return [
        layer
        for layer in range(config["num_hidden_layers"])
        if layer in config["mlp_only_layers"] or (layer + 1) % step
    ]


def expert_layers(config: Mapping[str, Any]) -> int:
    """How many layers are mixtures of experts by the same fields."""
    return int(config["num_hidden_layers"]) - len(dense_layers(config))


def sparse_layers(config: Mapping[str, Any]) -> JsonObject:
    """The layer pattern that :func:`dense_layers` is."""
    count = config["num_hidden_layers"]
    dense = dense_layers(config)
    if not dense:
        return {"kind": "all_moe"}
    if dense == list(range(len(dense))):
        return {"kind": "first_k_dense", "k": len(dense)}
    for n in range(2, count + 1):
        if dense == [layer for layer in range(count) if (layer + 1) % n]:
            return {"kind": "every_nth", "n": n}
    raise ConfigError(
        f"config.json has dense layers {dense} of {count}, and recipes know a regular step or the"
        " first ones only: it cannot be converted"
    )


def _with_parameters(templates: dict[str, str], biased: bool) -> dict[str, str]:
    return {
        f"{ours}.{kind}": f"{theirs}.{kind}"
        for ours, theirs in templates.items()
        for kind in ("weight", "bias")[: 1 + biased]
    }
