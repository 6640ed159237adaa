"""What a token's logits depend on if full experts drop tokens: what causal means
there, and what it does not.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pretrain.evaluation.call_dependence import call_dependence
from pretrain.model.decoder import DecoderLM
from tests.support.tiny_model import random_tokens, tiny_config, tiny_model

S, CHANGED = 64, 40
ROUTED = ("model.moe.kind=deepspeed", "model.moe.gate=router", "model.moe.eval_capacity_factor=1")
OWN_GATE = (
    "model.moe.kind=deepspeed",
    "model.moe.causal=false",
    "model.moe.eval_capacity_factor=1",
)
NO_DROPS = ("model.moe.kind=deepspeed", "model.moe.drop_tokens=false")
# Logits here have a standard deviation of 1.7.
EQUAL, OTHER = 2e-5, 0.1


@torch.inference_mode()
def one_by_one(model: DecoderLM, ids_BS: Tensor) -> Tensor:
    cache = model.new_cache(*ids_BS.shape, "cpu", torch.float32)
    return torch.cat(
        [model.logits(token_B1, cache=cache) for token_B1 in ids_BS.split(1, dim=1)], dim=1
    )


@torch.inference_mode()
def logits(model: DecoderLM, ids_BS: Tensor) -> Tensor:
    return model.logits(ids_BS)


def differences(overrides: tuple[str, ...]) -> dict[str, float]:
    """By how much at most a text's logits change if something is other than the tokens before each
    of its tokens.
    """
    model, ids_BS, other_BS = (
        tiny_model(*overrides).eval(),
        random_tokens(1, S),
        random_tokens(1, S, seed=5),
    )
    expected = logits(model, ids_BS)
    later_BS = torch.cat([ids_BS[:, :CHANGED], other_BS[:, CHANGED:]], dim=1)
    found = {
        "later tokens": logits(model, later_BS)[:, :CHANGED] - expected[:, :CHANGED],
        "fewer later tokens": logits(model, ids_BS[:, :CHANGED]) - expected[:, :CHANGED],
        "a text before it": logits(model, torch.cat([other_BS, ids_BS]))[1:] - expected,
        "a cache": one_by_one(model, ids_BS) - expected,
    }
    return {what: float(difference.abs().max()) for what, difference in found.items()}


def test_with_a_router_of_ours_no_later_token_is_seen_but_their_number_and_the_batch_are() -> None:
    found = differences(ROUTED)
    assert found.pop("later tokens") == 0.0
    assert min(found.values()) > OTHER, found


def test_with_deepspeeds_own_gate_later_tokens_are_seen_too() -> None:
    assert min(differences(OWN_GATE).values()) > OTHER


def test_without_drops_a_text_depends_on_its_own_earlier_tokens_alone() -> None:
    assert max(differences(NO_DROPS).values()) < EQUAL


@pytest.mark.parametrize(
    "overrides,said",
    [
        (ROUTED, "drops tokens"),
        (OWN_GATE, "drops tokens"),
        (NO_DROPS, None),
        ((*NO_DROPS, "model.moe.top2_2nd_expert_sampling=true"), "at random"),
        ((*ROUTED, "model.layer_pattern.kind=all_dense", "model.intermediate_size=32"), None),
        ((), None),
    ],
)
def test_it_is_said_of_the_models_for_which_it_is_true(
    overrides: tuple[str, ...], said: str | None
) -> None:
    sentence = call_dependence(tiny_config(*overrides))
    assert (sentence is None) == (said is None) and (said is None or said in str(sentence))


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("drop_tokens", ["true", "false"])
def test_deepspeeds_own_gate_computes_a_token_at_a_time(top_k: int, drop_tokens: str) -> None:
    """For one choice DeepSpeed refuses fewer tokens than min_capacity; with room for all, nothing
    is dropped.
    """
    model = tiny_model(
        *OWN_GATE[:2],
        f"model.moe.top_k={top_k}",
        f"model.moe.drop_tokens={drop_tokens}",
        "model.moe.eval_capacity_factor=8",
    ).eval()
    ids_BS = random_tokens(1, 12)
    torch.testing.assert_close(
        one_by_one(model, ids_BS), logits(model, ids_BS), rtol=1e-4, atol=EQUAL
    )
