"""The class that travels with an export computes what our model computes; it is opened by a process
that has nothing of this project.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from data_pipeline.tokenizer.config import TrainBPE
from data_pipeline.tokenizer.tokenizer import Tokenizer
from data_pipeline.tokenizer.training import train_bpe
from tests.support.custom_exports import CASES, PADDING, SMALL_RECIPES, Opened, open_elsewhere

# Together they have each attention, most positions, feed-forwards and routers, drops, and every odd
# place of a weight.
ALWAYS = (
    "latents with all options",
    "alibi of six heads with sinks",
    "feed_forward=gelu",
    "factorised tied embedding",
    "groups by their best expert",
    "drops of two choices",
    "product keys of three dimensions, batch norm",
    "multi-token prediction",
    "h64lm_mini",
    "p828_60m_mini",
)
DROPPING = [case for case in CASES if case.startswith("drops")]
cases = pytest.mark.parametrize(
    "case",
    [case if case in ALWAYS else pytest.param(case, marks=pytest.mark.full) for case in CASES],
)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_bpe(["a text to learn a few pairs from\n"] * 9, TrainBPE(vocab_size=260))


@pytest.fixture(scope="session")
def opened(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer
) -> dict[str, Opened]:
    """The cases that are to run, tried by one process."""
    asked = {
        item.callspec.params["case"]
        for item in request.session.items
        if item.path == Path(__file__) and hasattr(item, "callspec")
    }
    return open_elsewhere(
        tmp_path_factory.mktemp("custom"), [case for case in CASES if case in asked], tokenizer
    )


@cases
def test_logits_equal_ours(case: str, opened: dict[str, Opened]) -> None:
    one = opened[case]
    assert one.said["faults"] == {} and one.said["class"].startswith("transformers_modules.")
    with torch.inference_mode():
        ours = one.model.logits(one.prompts["ids"])
    assert ours.std() > 0.3
    torch.testing.assert_close(
        one.computed["logits"], ours, atol=1e-4 if case in SMALL_RECIPES else 2e-5, rtol=0
    )
    loss = functional.cross_entropy(ours[:, :-1].flatten(0, 1), one.prompts["ids"][:, 1:].flatten())
    assert one.computed["loss"].item() == pytest.approx(loss.item(), abs=1e-4)


@cases
def test_a_cache_under_an_unknown_name_is_refused_and_not_forgotten(
    case: str, opened: dict[str, Opened]
) -> None:
    assert "not as cache_of_another_name" in opened[case].said["unknown cache"]


@cases
def test_a_cache_changes_nothing(case: str, opened: dict[str, Opened]) -> None:
    """But where experts have limited room: there our own model says what tokens find one by one."""
    computed = opened[case].computed
    if case in DROPPING:
        model, ids_BS = opened[case].model, opened[case].prompts["ids"]
        with torch.inference_mode():
            cache = model.new_cache(*ids_BS.shape, "cpu", torch.float32)
            parts = ids_BS.split((7, 4, *[1] * (ids_BS.shape[1] - 11)), dim=1)
            ours = torch.cat([model.logits(part, cache=cache) for part in parts], dim=1)
        torch.testing.assert_close(computed["cached logits"], ours, atol=2e-5, rtol=0)
        assert (computed["cached logits"] - computed["logits"]).abs().max() > 1e-2
        return
    # Against fp64 both are 6e-6 of the logits' deviation away, which is 16 in the largest case.
    rounding = max(1e-4, 2e-5 * computed["logits"].std().item())
    torch.testing.assert_close(computed["cached logits"], computed["logits"], atol=rounding, rtol=0)
    for kind in ("greedy", "sampled", "beams"):
        assert torch.equal(computed[kind], computed[f"{kind} without cache"]), kind
    assert not torch.equal(computed["sampled"], computed["greedy"])


@cases
def test_padding_before_a_text_changes_nothing(case: str, opened: dict[str, Opened]) -> None:
    one = opened[case]
    if case in DROPPING:
        assert "limited capacity" in one.said["padding refused"]
        return
    for row, count in enumerate(PADDING):
        expected = one.computed["logits"][row, : one.prompts["ids"].shape[1] - count]
        torch.testing.assert_close(
            one.computed["padded logits"][row, count:], expected, atol=1e-4, rtol=0
        )
    with torch.inference_mode():
        ids_S = one.prompts["ids"][-1, : -PADDING[-1]]
        for token in one.computed["padded greedy"][-1]:
            logits_V = one.model.logits(ids_S[None])[0, -1].index_fill(
                0, torch.tensor([0]), -torch.inf
            )  # no end before the last token
            assert token == logits_V.argmax()
            ids_S = torch.cat((ids_S, token[None]))


@cases
def test_saved_by_transformers_it_opens_again_and_is_equal(
    case: str, opened: dict[str, Opened]
) -> None:
    assert opened[case].said["faults again"] == {}
    assert torch.equal(opened[case].computed["logits again"], opened[case].computed["logits"])


@cases
def test_in_bf16_it_rounds_no_worse_than_our_model_and_keeps_the_same_in_fp32(
    case: str, opened: dict[str, Opened]
) -> None:
    """Rounding flips close choices, in either model others.

    The median token shows how well the rest is computed.

    Where experts fill up, one flipped choice moves the places of all: there only the dtypes are
    compared.
    """
    one = opened[case]
    low = copy.deepcopy(one.model).to(torch.bfloat16)
    wide = [name.split()[0] for name in one.said["bf16 dtypes"] if not name.endswith("bfloat16")]
    ours_wide = {
        name.split(".")[-1]
        for name, tensor in low.state_dict().items()
        if tensor.dtype == torch.float32 and "experts" not in name
    }
    tables = {
        f"{name.split('.')[-2]}_rows"
        for name, tensor in low.state_dict().items()
        if tensor.dtype == torch.float32 and "experts" in name
    }
    assert (
        set(wide)
        == {f"running_{name}" if name in ("mean", "variance") else name for name in ours_wide}
        | tables
    )
    with torch.inference_mode():
        ours = low.logits(one.prompts["ids"])
    theirs, full = one.computed["bf16 logits"], one.computed["logits"]
    our_error, their_error = (
        ((low_BSV - full).norm(dim=-1) / full.norm(dim=-1)).median() for low_BSV in (ours, theirs)
    )
    assert theirs.dtype == torch.float32 and (case in DROPPING or 0 < their_error < 1.5 * our_error)


@cases
def test_only_what_training_reads_is_left_out(case: str, opened: dict[str, Opened]) -> None:
    one = opened[case]
    read_in_training = {
        name
        for name in one.model.state_dict()
        if name.startswith("multi_token.") or ".noise." in name
    }
    assert set(one.left_out) == read_in_training
