"""A mixture made of a dense model computes what the dense model does, or is refused with the
reason.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from pretrain.checkpoint.experts import read_experts
from pretrain.config.load import load_recipe
from pretrain.config.recipe import Recipe
from pretrain.core.errors import CheckpointError, ConfigError
from pretrain.merging.assembly import moe_recipe
from pretrain.merging.upcycle import Upcycling, check_sizes, upcycled_tensors
from pretrain.model.decoder import DecoderLM
from pretrain.model.init import initialize

WIDTH = 32
DENSE = [
    "model.vocab_size=97",
    "model.layer_pattern.kind=all_dense",
    f"model.intermediate_size={WIDTH}",
    "model.initializer_range=0.3",
]
NATIVE = ("moe.kind=deepspeed", "moe.gate=router", "moe.drop_tokens=false")
OWN_GATE = ("moe.kind=deepspeed", "moe.drop_tokens=false")
FEED_FORWARDS = (
    "swiglu",
    "swiglu, bias: true",
    "gelu, bias: true",
    "silu",
    "clamped_swiglu, bias: true",
    "product_swiglu, bias: true",
)


def dense_model(*overrides: str) -> tuple[Recipe, DecoderLM]:
    """A dense model whose biases are not zero."""
    recipe = load_recipe("debug", [*DENSE, *(f"model.{override}" for override in overrides)])
    model = DecoderLM(recipe.model)
    initialize(model, seed=5)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(0.0, 0.3, generator=generator)
    return recipe, model.eval()


def tensors_of(model: DecoderLM) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def upcycle(
    recipe: Recipe,
    model: DecoderLM,
    options: Upcycling,
    num_experts: int,
    top_k: int,
    *overrides: str,
) -> tuple[Recipe, Mapping[str, Tensor]]:
    sizes = {
        "num_experts": num_experts,
        "top_k": top_k,
        "moe_intermediate_size": WIDTH // options.granularity,
    }
    target = moe_recipe(recipe, "-upcycled", sizes, [f"model.{override}" for override in overrides])
    check_sizes(recipe.model, target.model, options)
    return target, dict(upcycled_tensors(tensors_of(model), target.model, options))


def filled(recipe: Recipe, tensors: Mapping[str, Tensor]) -> DecoderLM:
    model = DecoderLM(recipe.model)
    model.load_state_dict(dict(tensors))
    return model.eval()


def token_ids() -> Tensor:
    return torch.randint(0, 97, (2, 24), generator=torch.Generator().manual_seed(3))


@torch.inference_mode()
def difference(dense: DecoderLM, mixture: DecoderLM) -> float:
    """Of logits, whose standard deviation is about 1."""
    return float((dense.logits(token_ids()) - mixture.logits(token_ids())).abs().max())


CASES: dict[str, tuple[Upcycling, int, int, tuple[str, ...]]] = {
    "copies": (Upcycling(), 4, 2, ()),
    "one expert of one": (Upcycling(), 1, 1, ()),
    "in DeepSpeed's layer": (Upcycling(), 4, 2, NATIVE),
    "shards in DeepSpeed's layer": (Upcycling(2), 8, 4, NATIVE),
    "DeepSpeed's own gate": (Upcycling(), 4, 2, OWN_GATE),
    "shards with DeepSpeed's own gate": (Upcycling(2), 4, 2, OWN_GATE),
    "DeepSpeed's own gate with one choice": (Upcycling(router_std=0.0), 4, 1, OWN_GATE),
    "one choice, zero router": (Upcycling(router_std=0.0), 4, 1, ()),
    "a residual expert": (Upcycling(), 4, 2, (*NATIVE, "moe.use_residual=true")),
    "scaled weights": (Upcycling(), 4, 2, ("moe.router.routed_scaling_factor=2.5",)),
    "scaled weights of shards": (
        Upcycling(4),
        16,
        8,
        ("moe.router.routed_scaling_factor=2.5", "moe.router.bias=true"),
    ),
    "sigmoid scores": (
        Upcycling(2),
        8,
        4,
        ("moe.router.kind=sigmoid_topk", "moe.bias_balancing={}"),
    ),
    "noisy router": (Upcycling(), 4, 2, ("moe.router.kind=noisy_topk",)),
    "softmax weights as they are, zero router": (
        Upcycling(router_std=0.0),
        4,
        2,
        ("moe.router.norm_topk_prob=false",),
    ),
    "sigmoid weights as they are, zero router": (
        Upcycling(router_std=0.0),
        4,
        3,
        ("moe.router={kind: sigmoid_topk, norm_topk_prob: false, routed_scaling_factor: 1.5}",),
    ),
    "all experts chosen, weights as they are": (
        Upcycling(),
        4,
        4,
        ("moe.router={norm_topk_prob: false, temperature: 2}",),
    ),
    "all shards chosen, zero router": (
        Upcycling(2, router_std=0.0),
        4,
        4,
        ("moe.router.norm_topk_prob=false",),
    ),
    "expert groups": (Upcycling(), 4, 2, ("moe.router.groups={num_groups: 2, top_k_groups: 1}",)),
    "shared experts beside them": (
        Upcycling(),
        4,
        2,
        ("moe.num_shared_experts=2", "moe.shared_expert_gate=true"),
    ),
    "every second layer": (Upcycling(), 4, 2, ("layer_pattern={kind: every_nth, n: 2}",)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_mixture_computes_what_the_dense_model_does(case: str) -> None:
    options, num_experts, top_k, overrides = CASES[case]
    recipe, dense = dense_model("feed_forward={kind: swiglu, bias: true}")
    mixture = filled(*upcycle(recipe, dense, options, num_experts, top_k, *overrides))
    assert difference(dense, mixture) < 1e-5
    ids, ones = token_ids(), float(2 * 24)
    with torch.no_grad():
        losses = [model.train()(ids, ids.roll(-1, 1), ones).nll for model in (dense, mixture)]
    assert float(losses[0] - losses[1]) / ones == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("feed_forward", FEED_FORWARDS)
@pytest.mark.parametrize("kind", [(), NATIVE], ids=["dropless", "deepspeed"])
@pytest.mark.parametrize("granularity", [1, 4])
def test_it_does_for_every_kind_of_feed_forward(
    feed_forward: str, kind: tuple[str, ...], granularity: int
) -> None:
    recipe, dense = dense_model(
        f"feed_forward={{kind: {feed_forward}}}", "multi_token_prediction={}"
    )
    options = Upcycling(granularity)
    target, tensors = upcycle(recipe, dense, options, 4 * granularity, 2 * granularity, *kind)
    mixture = filled(target, tensors)
    assert difference(dense, mixture) < 2e-5
    with torch.no_grad():
        losses = [
            float(model.train()(token_ids(), token_ids().roll(-1, 1), 48.0).multi_token_nll) / 48
            for model in (dense, mixture)
        ]
    assert losses[0] == pytest.approx(losses[1], abs=2e-5)


def test_half_a_group_of_shards_computes_something_else() -> None:
    """The counterpart of the equalities must differ: the same weights, one choice too few."""
    recipe, dense = dense_model()
    target, tensors = upcycle(recipe, dense, Upcycling(2), 8, 4)
    fewer = recipe.model_copy(
        update={
            "model": target.model.model_copy(
                update={"moe": target.model.moe.model_copy(update={"top_k": 3})}
            )
        }
    )
    assert (
        difference(dense, filled(target, tensors))
        < 1e-5
        < 1e-2
        < difference(dense, filled(fewer, tensors))
    )


@pytest.mark.parametrize(
    "options,num_experts,top_k,overrides,reason",
    [
        (
            Upcycling(),
            4,
            2,
            ("moe.router.norm_topk_prob=false",),
            "add up to another number for each token",
        ),
        (Upcycling(), 4, 1, (), "take --router zero, with which they are all alike$"),
        (Upcycling(), 4, 1, ("moe.router.norm_topk_prob=true",), "lets the router learn nothing"),
        (
            Upcycling(),
            4,
            2,
            ("position.rope_theta=5e5",),
            r"model\.position\.rope_theta \(10000.0 before, 500000.0 now\)",
        ),
        (
            Upcycling(),
            4,
            2,
            ("attention.num_attention_heads=2", "attention.head_dim=16"),
            r"num_attention_heads \(4 before, 2 now\)",
        ),
        (
            Upcycling(router_std=0.0),
            4,
            2,
            ("moe.router={kind: noisy_topk, norm_topk_prob: false}",),
            "add up to another number",
        ),
        (Upcycling(), 4, 2, ("moe.kind=deepspeed", "moe.gate=router"), "would drop tokens"),
        (Upcycling(2), 4, 3, (), "must be multiples of --granularity"),
        (Upcycling(2), 5, 2, (), "must be multiples of --granularity"),
        (Upcycling(2, router_std=0.0), 4, 2, (), "would choose any of them"),
        (Upcycling(2), 4, 2, ("moe.router.kind=noisy_topk",), "noise scores the shards"),
        (
            Upcycling(2),
            4,
            2,
            ("moe.router.groups={num_groups: 2, top_k_groups: 1}",),
            "may divide a group",
        ),
        (Upcycling(2), 4, 4, (*NATIVE, "moe.use_residual=true"), "hold one shard only"),
        (Upcycling(2), 4, 2, (*OWN_GATE, "moe.top2_2nd_expert_sampling=true"), "at random"),
        (Upcycling(), 4, 2, ("moe.moe_intermediate_size=16",), "must be the dense model's"),
        (Upcycling(), 4, 2, ("layer_pattern.kind=all_dense",), "no layer with experts"),
    ],
)
def test_what_cannot_be_equal_is_refused_with_the_reason(
    options: Upcycling, num_experts: int, top_k: int, overrides: tuple[str, ...], reason: str
) -> None:
    recipe, dense = dense_model()
    with pytest.raises(ConfigError, match=reason):
        upcycle(recipe, dense, options, num_experts, top_k, *overrides)


def test_a_mixture_is_not_upcycled_again() -> None:
    recipe = load_recipe("debug", ["model.vocab_size=97", f"model.intermediate_size={WIDTH}"])
    with pytest.raises(
        CheckpointError, match="layer 0 of the checkpoint is a mixture of experts already"
    ):
        check_sizes(recipe.model, recipe.model, Upcycling())


def test_noise_is_a_share_of_each_matrix_and_differs_between_experts() -> None:
    recipe, dense = dense_model()
    target, tensors = upcycle(recipe, dense, Upcycling(noise_std=0.1), 4, 2)
    before = tensors_of(dense)
    experts = read_experts(tensors, "layers.1.feed_forward", target.model)
    for name in experts[0]:
        original = before[f"layers.1.feed_forward.{name}"]
        for expert in experts:
            assert float((expert[name] - original).std() / original.std()) == pytest.approx(
                0.1, rel=0.15
            )
        assert not torch.equal(experts[0][name], experts[1][name])
    assert difference(dense, filled(target, tensors)) > 1e-3


@pytest.mark.parametrize("kind", ["swiglu", "product_swiglu", "gelu"])
def test_a_share_of_the_hidden_numbers_is_drawn_anew(kind: str) -> None:
    recipe, dense = dense_model(f"feed_forward={{kind: {kind}}}")
    target, tensors = upcycle(recipe, dense, Upcycling(reinit_share=0.25), 4, 2)
    before, changed = tensors_of(dense), []
    for expert in read_experts(tensors, "layers.0.feed_forward", target.model):
        differing = {
            name: tensor != before[f"layers.0.feed_forward.{name}"]
            for name, tensor in expert.items()
        }
        units = differing["down_proj.weight"].all(dim=0)
        assert units.sum() == 8 and (differing["down_proj.weight"].any(dim=0) == units).all()
        # The rows of the first matrices belong to the same hidden units.
        rows = units.repeat_interleave(len(differing["up_proj.weight"]) // WIDTH)
        assert all(
            (differing[name].all(dim=1) == rows).all()
            for name in differing
            if name != "down_proj.weight"
        )
        changed.append(units)
    assert not torch.equal(changed[0], changed[1])


def test_the_same_seed_gives_the_same_mixture_and_another_seed_another() -> None:
    recipe, dense = dense_model()
    mixtures = [
        upcycle(recipe, dense, Upcycling(noise_std=0.1, reinit_share=0.5, seed=seed), 4, 2)[1]
        for seed in (0, 0, 1)
    ]
    assert all(torch.equal(mixtures[0][name], mixtures[1][name]) for name in mixtures[0])
    names = ("layers.0.feed_forward.router.gate.weight", "layers.0.feed_forward.experts.w2")
    assert not any(torch.equal(mixtures[0][name], mixtures[2][name]) for name in names)
