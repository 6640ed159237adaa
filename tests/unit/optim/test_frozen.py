"""Names and parts of a model that a phase freezes."""

from __future__ import annotations

import pytest

from pretrain.config.load import load_recipe
from pretrain.core.errors import ConfigError
from pretrain.optim.frozen import frozen_parameters, part_of

PARAMETERS = {
    "embedding.weight": "embedding",
    "position.weight": "embedding",
    "layers.0.attention_norm.weight": "norm",
    "layers.0.attention.q_proj.weight": "attention",
    "layers.0.attention.q_norm.weight": "attention",
    "layers.0.attention.sinks": "attention",
    "layers.0.feed_forward.up_proj.weight": "feed_forward",
    "layers.1.feed_forward_norm.weight": "norm",
    "layers.1.feed_forward.router.gate.weight": "router",
    "layers.1.feed_forward.deepspeed_moe.gate.wg.weight": "router",
    "layers.1.feed_forward.retrieval.keys_0": "router",
    "layers.1.feed_forward.experts.w1": "experts",
    "layers.1.feed_forward.b2": "experts",
    "layers.1.feed_forward.experts.down.weight": "experts",
    "layers.1.feed_forward.deepspeed_moe.experts.deepspeed_experts.0.up_proj.weight": "experts",
    "layers.1.feed_forward.shared.feed_forward.up_proj.weight": "shared_experts",
    "layers.1.feed_forward.shared.gate.weight": "shared_experts",
    "multi_token.projection.weight": None,
    "multi_token.block.feed_forward.experts.w2": "experts",
    "final_norm.weight": "norm",
    "head.weight": "head",
}


PEER = "model.moe={kind: peer, product_key_sizes: [4, 4], query_dim: 16, num_heads: 2, top_k: 3}"
MODELS = {
    "dropless": load_recipe("debug").model,
    "deepspeed": load_recipe("debug", ["model.moe.kind=deepspeed", "model.moe.gate=router"]).model,
    "peer": load_recipe("debug", [PEER]).model,
}
DROPLESS = MODELS["dropless"]


def kind_of(name: str) -> str:
    """The kind of layer whose parameter a name of ``PARAMETERS`` is."""
    if "deepspeed_moe" in name:
        return "deepspeed"
    return "peer" if ".retrieval." in name or "experts.down" in name else "dropless"


def test_every_kind_of_parameter_is_in_its_part() -> None:
    assert {name: part_of(name, MODELS[kind_of(name)]) for name in PARAMETERS} == PARAMETERS


@pytest.mark.parametrize("part", sorted({part for part in PARAMETERS.values() if part}))
def test_a_part_stands_for_its_parameters(part: str) -> None:
    for kind, model in MODELS.items():
        names = [name for name in PARAMETERS if kind_of(name) in (kind, "dropless")]
        names = [name for name in names if part_of(name, model) == PARAMETERS[name]]
        assert frozen_parameters(names, [part], model, "x") == {
            name for name in names if PARAMETERS[name] == part
        }


def test_patterns_of_names_and_parts_add_up() -> None:
    found = frozen_parameters(PARAMETERS, ["layers.0.*", "head"], DROPLESS, "x")
    assert found == {name for name in PARAMETERS if name.startswith("layers.0.")} | {"head.weight"}
    assert frozen_parameters(PARAMETERS, [], DROPLESS, "x") == set()


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("routr", "'router'"),
        ("layers.9.*", "the model has|did you mean"),
        ("embedding.weights", "'embedding.weight'"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused_with_near_names(pattern: str, hint: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"phases\.late\.frozen names '{pattern.replace('*', '.')}.*({hint})"
    ):
        frozen_parameters(PARAMETERS, ["head", pattern], DROPLESS, "phases.late.frozen")
