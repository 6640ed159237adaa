"""Mistakes of published MoE systems that this model must not make.

Those of attention and positions are in test_attention_kinds.py, test_positions.py and
test_attention_kernels.py, those of routers and balancing in test_router.py and
test_router_kinds.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from pretrain.model.block import Block
from pretrain.model.init import initialize
from pretrain.model.moe.losses import LOSSES, RoutedBatch, cv_loss, z_loss
from pretrain.model.moe.router import Routing
from tests.support.tiny_model import random_tokens, tiny_model

TOKENS = random_tokens(2, 17, seed=3)


def output_of(*overrides: str, **options: Any) -> Any:
    return tiny_model(*overrides, **options).train()(TOKENS[:, :-1], TOKENS[:, 1:], 32.0)


def test_moe_fast_gpt_tied_head_and_embedding_are_one_tensor() -> None:
    """It sets ``lm_head.weight``, but the layer multiplies with ``lm_head.linear.weight``: 12.8 M
    parameters of their own.
    """
    model = tiny_model("model.tie_word_embeddings=true", "model.embedding_size=16")
    assert model.head.weight is model.embedding.weight
    before = model.logits(TOKENS)
    with torch.no_grad():
        model.embedding.weight[7] += 1.0
    changed = (model.logits(TOKENS) - before).abs().amax(dim=(0, 1))
    assert changed[7] > 0.1


def test_moe_fast_gpt_importance_is_that_of_the_chosen_experts() -> None:
    """Its CV^2 is taken of the mean probabilities of all experts: soft ones look balanced while two
    experts get every token.
    """
    logits_TE = torch.tensor([[0.02, 0.01, 0.0, 0.0]] * 8)
    probs_TE = logits_TE.softmax(-1)
    weights_TK, ids_TK = probs_TE.topk(2)
    batch = RoutedBatch(
        Routing(logits_TE, probs_TE, ids_TK, weights_TK),
        torch.tensor([8.0, 8, 0, 0]),
        torch.tensor([1.0, 1, 0, 0]),
        probs_TE.mean(0),
        2,
        lambda of_this_rank: of_this_rank,
    )
    assert cv_loss(batch).item() == pytest.approx(1.0, rel=1e-3)
    mean_E = probs_TE.mean(0)
    assert (mean_E.var(correction=0) / mean_E.mean() ** 2).item() < 1e-3


def test_h64lm_z_loss_is_of_the_logsumexp() -> None:
    """It takes mean(logits^2), which pulls every logit to zero, whatever the logsumexp."""
    logits_TE = torch.full((4, 8), -math.log(8))
    batch = RoutedBatch(
        Routing(
            logits_TE, logits_TE.softmax(-1), torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1)
        ),
        *[torch.ones(8)] * 3,
        1,
        lambda of_this_rank: of_this_rank,
    )
    assert z_loss(batch).item() == pytest.approx(0.0, abs=1e-10)
    assert logits_TE.square().mean() > 4


def test_h64lm_router_losses_are_not_diluted_by_dense_layers() -> None:
    """It averages over all layers although every second one is dense, which halves its
    coefficients.
    """
    pattern = (
        "model.layer_pattern={kind: every_nth, n: 2}",
        "model.intermediate_size=32",
        "model.moe.z_loss_weight=0",
    )
    output, without = (
        output_of(*pattern, f"model.moe.aux_loss_weight={weight}") for weight in (1.0, 0.0)
    )
    assert output.router.losses_LJ.shape == (1, len(LOSSES))
    assert (output.loss - without.loss).item() == pytest.approx(
        output.router.losses_LJ[0, 0].item(), rel=1e-4
    )


@pytest.mark.parametrize("pattern", ["all_moe", "all_dense"])
def test_h64lm_checkpointed_blocks_are_recomputed(
    pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its condition leaves out dense and MoE layers alike: no block is ever recomputed."""
    calls: list[int] = []
    forward = Block.forward
    monkeypatch.setattr(
        Block,
        "forward",
        lambda self, *args, **kwargs: calls.append(id(self)) or forward(self, *args, **kwargs),
    )
    output = output_of(
        f"model.layer_pattern.kind={pattern}",
        "model.intermediate_size=32",
        activation_checkpointing="full",
    )
    assert len(calls) == 2
    output.loss.backward()
    assert len(calls) == 4


def test_h64lm_sinks_take_part() -> None:
    """Its "attention sinks" are ``pass``."""
    model = tiny_model("model.attention.sinks=true")
    before = model.logits(TOKENS)
    with torch.no_grad():
        for block in model.layers:
            block.attention.sinks += 3.0
    assert (model.logits(TOKENS) - before).abs().max() > 0.1


def test_h64lm_weights_start_with_the_spread_the_recipe_says() -> None:
    """Its standard deviation is scaled twice, by depth and again by 1 / sqrt(fan in): 0.0007
    instead of 0.02.
    """
    model = tiny_model("model.initializer_range=0.02", "model.hidden_size=256")
    assert model.layers[0].attention.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.layers[0].attention.o_proj.weight.std().item() == pytest.approx(
        0.02 / math.sqrt(2 * 2), rel=0.05
    )


def test_moe_fast_gpt_embeddings_start_as_the_recipe_says() -> None:
    """It initialises the embedding, and then applies Xavier to everything, this one included."""
    model = tiny_model("model.initializer_range=0.02", "model.hidden_size=256")
    nn.init.xavier_uniform_(model.embedding.weight)
    initialize(model, seed=1)
    assert model.embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_khanh_no_position_sees_the_token_it_predicts() -> None:
    """Without its causal mask each position read its own label, and the loss fell to 0.13 (its
    "crystal ball").
    """
    parts = (
        "model.norm={kind: layer_norm}",
        "model.norm_position=post",
        "model.final_norm=false",
        "model.position={kind: learned}",
    )
    model, inputs = tiny_model(*parts, "model.attention.bias=all").eval(), TOKENS[:, :-1]
    other = inputs.clone()
    other[:, 8] = (other[:, 8] + 1) % 100
    with torch.no_grad():
        torch.testing.assert_close(
            model.logits(other)[:, :8], model.logits(inputs)[:, :8], atol=1e-6, rtol=1e-6
        )
        assert (model.logits(other)[:, 8:] - model.logits(inputs)[:, 8:]).abs().max() > 1e-2


def test_p828_one_group_of_two_is_no_choice_within_it() -> None:
    """With two groups of two experts, one group and two choices, the whole group is always chosen:
    only the group is.
    """
    groups = "model.moe.router.groups={num_groups: 2, top_k_groups: 1}"
    counts_LE = output_of(groups).router.counts_LE
    assert torch.equal(counts_LE[:, 0], counts_LE[:, 1]) and torch.equal(
        counts_LE[:, 2], counts_LE[:, 3]
    )
    free_LE = output_of("model.moe.router.groups={num_groups: 2, top_k_groups: 2}").router.counts_LE
    assert not torch.equal(free_LE[:, 0], free_LE[:, 1])
