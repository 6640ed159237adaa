"""Pruning and folding: what is chosen, what becomes of it, and where the loss must not change."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.loading.packing import Windows
from data_pipeline.loading.validation import validation_batches
from data_pipeline.shards.datasets import load_datasets
from pretrain.checkpoint.experts import (
    cosines,
    moe_prefixes,
    read_experts,
    router_names,
    weight_similarity,
    write_experts,
)
from pretrain.checkpoint.layout import read_recipe
from pretrain.checkpoint.weights import load_model, load_state_dict
from pretrain.core.errors import ConfigError
from pretrain.merging.fewer_experts import folded, pruned
from pretrain.merging.publish import Scoring
from pretrain.merging.usage import expert_outputs, measure, moe_layers
from pretrain.model.decoder import DecoderLM
from pretrain.model.init import initialize
from pretrain.model.moe.config import DeepSpeedMoEConfig
from tests.support.checkpoint_variants import changed_recipe, variant
from tests.support.tiny_checkpoint import Trained
from tools.merge_checkpoints import main

SIGMOID = ("model.moe.router={kind: sigmoid_topk}", "model.moe.bias_balancing={}")
NATIVE = (
    "model.moe={kind: deepspeed, drop_tokens: false, num_experts: 4, top_k: 2,"
    " moe_intermediate_size: 32}"
)
NEVER = -1e3
SCORING = Scoring(None, "validation", 6, torch.device("cpu"))


def reduce(job: str, checkpoint: Path, output: Path, *options: str) -> dict[str, Any]:
    report = output.with_name(output.name + ".json")
    arguments = [
        job,
        "--checkpoint",
        checkpoint,
        "--output",
        output,
        "--max-windows",
        "8",
        *options,
        "--json",
        report,
    ]
    main([str(argument) for argument in arguments])
    result: dict[str, Any] = json.loads(report.read_text())
    return result


def before_and_after(result: dict[str, Any]) -> tuple[float, float]:
    (before,) = result["losses_before"].values()
    return before, result["loss_after"]


def biased(router: str, biases: list[float]) -> Callable[[dict[str, Tensor]], None]:
    """Adds balancing biases to every layer's router."""

    def edit(tensors: dict[str, Tensor]) -> None:
        for prefix in ("layers.0.feed_forward", "layers.1.feed_forward"):
            tensors[f"{prefix}.{router}balance_bias"] = torch.tensor(biases)

    return edit


@pytest.mark.parametrize(
    "overrides,tolerance",
    [(SIGMOID, 1e-7), (("model.moe.bias_balancing={}",), 1e-6)],
    ids=["sigmoid", "softmax"],
)
def test_pruning_an_expert_that_was_never_used_leaves_the_loss(
    trained: Trained, tmp_path: Path, overrides: tuple[str, ...], tolerance: float
) -> None:
    """Up to rounding: some CPUs multiply by three router rows in another order than by four, and
    softmax weights are rounded after another sum.
    """
    unused = variant(
        trained, tmp_path / "unused", biased("router.", [0.0, 0.0, NEVER, 0.0]), *overrides
    )
    result = reduce("prune", unused, tmp_path / "out", "--keep", "3")
    before, after = before_and_after(result)
    assert after == pytest.approx(before, abs=tolerance)
    assert [layer["experts"] for layer in result["layers"]] == [[[0], [1], [3]]] * 2
    assert all(
        layer["usage"][2] == 0 and sum(layer["usage"]) == pytest.approx(1)
        for layer in result["layers"]
    )
    fewer = reduce("prune", unused, tmp_path / "fewer", "--keep", "2")
    assert before_and_after(fewer)[1] != before
    model, recipe = load_model(tmp_path / "out")
    assert (
        recipe.model.moe is not None
        and recipe.model.moe.num_experts == 3
        and recipe.name == "debug-pruned"
    )
    assert model.layers[0].feed_forward.router.balance_bias.tolist() == [0, 0, 0]


def test_pruning_keeps_the_used_experts_and_their_router_rows(
    trained: Trained, tmp_path: Path
) -> None:
    result = reduce("prune", trained.checkpoint, tmp_path / "out", "--keep", "3")
    before, after = load_state_dict(trained.checkpoint), load_state_dict(tmp_path / "out")
    for layer in result["layers"]:
        kept = [number for (number,) in layer["experts"]]
        (dropped,) = set(range(4)) - set(kept)
        # Any of those that were used least, if there are several.
        assert kept == sorted(kept) and layer["usage"][dropped] == min(layer["usage"])
        prefix = f"layers.{layer['layer']}.feed_forward"
        for name in (
            f"{prefix}.experts.w1",
            f"{prefix}.experts.w2",
            f"{prefix}.experts.w3",
            f"{prefix}.router.gate.weight",
        ):
            assert torch.equal(after[name], before[name][kept])
    assert all(
        torch.equal(after[name], before[name]) for name in after if ".feed_forward." not in name
    )


def duplicated_experts(tensors: dict[str, Tensor]) -> None:
    """Makes experts 1 and 3 of every layer the same, and the router's rows for them."""
    for name, tensor in tensors.items():
        if ".experts.w" in name or name.endswith("router.gate.weight"):
            tensors[name] = tensor.clone()
            tensors[name][3] = tensor[1]


@pytest.mark.parametrize("similarity", ["weights", "outputs"])
def test_two_identical_experts_fold_without_change(
    trained: Trained, tmp_path: Path, similarity: str
) -> None:
    same = variant(
        trained,
        tmp_path / "same",
        duplicated_experts,
        "model.moe.top_k=1",
        "model.moe.router={kind: sigmoid_topk, norm_topk_prob: true}",
    )
    result = reduce("fold", same, tmp_path / "out", "--keep", "3", "--similarity", similarity)
    before, after = before_and_after(result)
    assert after == before
    assert [layer["experts"] for layer in result["layers"]] == [[[0], [1, 3], [2]]] * 2
    states = load_state_dict(same), load_state_dict(tmp_path / "out")
    assert torch.equal(
        states[1]["layers.0.feed_forward.experts.w1"],
        states[0]["layers.0.feed_forward.experts.w1"][:3],
    )
    fewer = reduce("fold", same, tmp_path / "fewer", "--keep", "2", "--similarity", similarity)
    assert before_and_after(fewer)[1] != before


def test_a_folded_expert_is_the_mean_weighted_by_usage(trained: Trained, tmp_path: Path) -> None:
    result = reduce(
        "fold", trained.checkpoint, tmp_path / "out", "--keep", "2", "--similarity", "weights"
    )
    before, after = load_state_dict(trained.checkpoint), load_state_dict(tmp_path / "out")
    for layer in result["layers"]:
        usage = torch.tensor(layer["usage"])
        for name in ("experts.w1", "experts.w2", "router.gate.weight"):
            whole = before[f"layers.{layer['layer']}.feed_forward.{name}"]
            for number, cluster in enumerate(layer["experts"]):
                shares = usage[cluster] / usage[cluster].sum()
                mean = sum(share * whole[one] for share, one in zip(shares, cluster, strict=True))
                torch.testing.assert_close(
                    after[f"layers.{layer['layer']}.feed_forward.{name}"][number],
                    mean,
                    rtol=1e-4,
                    atol=1e-6,
                )
        assert sorted(number for cluster in layer["experts"] for number in cluster) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "overrides",
    [
        (
            NATIVE.replace("kind", "gate: router, kind"),
            "model.feed_forward={kind: gelu, bias: true}",
        ),
        (NATIVE, "model.multi_token_prediction={}"),
        (
            "model.moe.router={kind: noisy_topk, bias: true}",
            "model.multi_token_prediction={}",
            "model.feed_forward.bias=true",
        ),
    ],
)
def test_both_kinds_of_layer_and_the_block_of_multi_token_prediction_lose_experts(
    trained: Trained, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    folder = random_model(trained, tmp_path / "random", *overrides)
    result = reduce("prune", folder, tmp_path / "pruned", "--keep", "2")
    assert len(result["layers"]) == len(read_recipe(folder).model.routed_layers)
    reduce("fold", folder, tmp_path / "folded", "--keep", "3")
    for name, keep in (("pruned", 2), ("folded", 3)):
        _, recipe = load_model(
            tmp_path / name
        )  # raises where a tensor is missing, superfluous or of another shape
        assert recipe.model.moe is not None and recipe.model.moe.num_experts == keep


def random_model(trained: Trained, folder: Path, *overrides: str) -> Path:
    recipe = changed_recipe(trained.recipe, *overrides)
    model = DecoderLM(recipe.model)
    initialize(model, seed=1)

    def edit(tensors: dict[str, Tensor]) -> None:
        tensors.clear()
        tensors |= {name: parameter.detach() for name, parameter in model.named_parameters()}

    return variant(trained, folder, edit, *overrides)


def test_usage_is_the_count_of_choices_over_the_held_out_windows(trained: Trained) -> None:
    usage_LE, _ = measure(trained.checkpoint, SCORING)
    windows = Windows(load_datasets({"": str(trained.data)}).stream("validation"), 32, 0, False)
    expected_LE = torch.zeros(2, 4)
    model, _ = load_model(trained.checkpoint)
    choices: list[Tensor] = []
    for layer in moe_layers(model):
        layer.router.register_forward_hook(
            lambda module, arguments, output: choices.append(output.topk_ids_TK.flatten())
        )
    for batch in validation_batches(windows, 1, 0, 1, 6):
        with torch.no_grad():
            model.logits(batch.input_ids_BS)
    for call, ids in enumerate(choices):
        expected_LE[call % 2] += torch.bincount(ids, minlength=4)
    assert torch.equal(usage_LE.float(), expected_LE) and usage_LE.sum() == 2 * 6 * 32 * 2


def test_dropout_of_the_embedding_does_not_disturb_what_is_measured(
    trained: Trained, tmp_path: Path
) -> None:
    overrides = ("model.multi_token_prediction={}", "model.dropout={embedding: 0.5, residual: 0.5}")
    folder = random_model(trained, tmp_path / "random", *overrides)
    first, second = measure(folder, SCORING)[0], measure(folder, SCORING)[0]
    assert first.shape == (3, 4) and torch.equal(first, second)


def test_answers_of_experts_are_those_that_the_layer_mixes(trained: Trained) -> None:
    _, inputs = measure(trained.checkpoint, SCORING, keep_inputs=True)
    state, config = load_state_dict(trained.checkpoint), trained.recipe.model
    for layer, prefix, x_TD in zip(
        moe_layers(trained.model), moe_prefixes(config), inputs, strict=True
    ):
        answers_ETD = expert_outputs(read_experts(state, prefix, config), config, x_TD)
        with torch.no_grad():
            y_BTD, _ = layer(x_TD[None])
            routing = layer.router(x_TD)
        mixed_TD = sum(
            routing.topk_weights_TK[:, k, None]
            * answers_ETD[routing.topk_ids_TK[:, k], torch.arange(len(x_TD))]
            for k in range(2)
        )
        torch.testing.assert_close(y_BTD[0], mixed_TD, rtol=1e-4, atol=1e-5)


def test_clusters_join_the_most_alike_and_pruning_stays_in_groups(trained: Trained) -> None:
    moe = trained.recipe.model.moe
    assert moe is not None
    points = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 1.0]])
    alike = cosines(list(points))
    assert folded(alike, 2, moe) == [[0, 1], [2, 3]] and folded(alike, 3, moe) == [[0], [1], [2, 3]]
    assert folded(alike, 1, moe) == [[0, 1, 2, 3]] and folded(alike, 4, moe) == [[0], [1], [2], [3]]
    usage_E = torch.tensor([9.0, 8.0, 1.0, 2.0])
    assert pruned(usage_E, 2, moe) == [[0], [1]]
    grouped = changed_recipe(
        trained.recipe, "model.moe.router.groups={num_groups: 2, top_k_groups: 2}"
    ).model.moe
    assert grouped is not None and pruned(usage_E, 2, grouped) == [[0], [3]]
    assert folded(alike, 2, grouped) == [[0, 1], [2, 3]]
    with pytest.raises(ConfigError, match="multiple of the router's 2 groups"):
        pruned(usage_E, 3, grouped)


@pytest.mark.parametrize(
    "feed_forward",
    ["{kind: swiglu}", "{kind: gelu, bias: true}", "{kind: product_swiglu, bias: true}"],
)
@pytest.mark.parametrize("kind", ["dropless", "deepspeed"])
def test_experts_are_read_and_written_back_under_the_names_of_the_model(
    trained: Trained, kind: str, feed_forward: str
) -> None:
    native = [NATIVE] if kind == "deepspeed" else []
    recipe = changed_recipe(trained.recipe, f"model.feed_forward={feed_forward}", *native)
    model = DecoderLM(recipe.model)
    initialize(model, seed=1)
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    for prefix in moe_prefixes(recipe.model):
        experts = read_experts(state, prefix, recipe.model)
        back = write_experts(experts, prefix, recipe.model)
        assert all(torch.equal(back[name], state[name]) for name in back)
        left = {name for name in state if name.startswith(f"{prefix}.")} - back.keys()
        assert recipe.model.moe is not None and left == set(router_names(prefix, recipe.model.moe))
    assert isinstance(recipe.model.moe, DeepSpeedMoEConfig) == (kind == "deepspeed")
    alike_EE = weight_similarity(experts)
    assert torch.allclose(alike_EE.diagonal(), torch.ones(4))


@pytest.mark.parametrize(
    "options,error,sentence",
    [
        (("--keep", "0"), ConfigError, "--keep is 0"),
        (("--keep", "5"), ConfigError, "--keep is 5: give 1 to 4 experts"),
        (("--keep", "1"), ConfigError, "top_k is 2, but there are only 1 experts"),
        (("--keep", "3", "--set", "parallel.ep_size=2"), ConfigError, "does not divide"),
        (("--keep", "3", "--data", "/nowhere"), Exception, "/nowhere"),
    ],
)
def test_what_cannot_be_pruned_is_refused(
    trained: Trained,
    tmp_path: Path,
    options: tuple[str, ...],
    error: type[Exception],
    sentence: str,
) -> None:
    with pytest.raises(error, match=sentence):
        reduce("prune", trained.checkpoint, tmp_path / "out", *options)
    assert list(tmp_path.iterdir()) == []


def test_a_dense_model_has_no_experts_to_prune(trained: Trained, tmp_path: Path) -> None:
    dense = random_model(
        trained,
        tmp_path / "dense",
        "model.layer_pattern.kind=all_dense",
        "model.intermediate_size=16",
    )
    with pytest.raises(ConfigError, match="no layer with experts"):
        reduce("prune", dense, tmp_path / "out", "--keep", "1")
