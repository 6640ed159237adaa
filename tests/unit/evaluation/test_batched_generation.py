"""Several texts at once: each is what it would be alone, whatever stands beside it, for every kind
of attention and position.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pretrain.core.errors import ConfigError
from pretrain.evaluation.generation import generate as generation
from pretrain.evaluation.generation.generate import (
    NextLogits,
    continue_prompts,
    native_next_logits,
    right_aligned,
)
from pretrain.evaluation.generation.sampling import Sampling
from pretrain.model.decoder import DecoderLM
from tests.support.model_kinds import KINDS, OPTIONS
from tests.support.tiny_model import tiny_model

CPU = torch.device("cpu")
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3], [7], [2, 7, 1, 8], [11, 12, 13, 14, 15, 16]]
NEW_TOKENS = 8
ATTENTION = {
    f"{family}={kind}": KINDS[family, kind]
    for family, kind in KINDS
    if family in ("attention", "position", "moe")
}
ATTENTION |= {
    name: OPTIONS[name] for name in ("sliding window", "attention sinks", "multi-token prediction")
}
ATTENTION["alibi, window, sinks and latent attention"] = [
    *KINDS["attention", "mla"],
    "model.position.kind=rope_alibi",
    "model.attention.sliding_window=4",
    "model.attention.sinks=true",
]


def logits_of(next_logits: NextLogits, prompts: list[list[int]], forced: list[list[int]]) -> Tensor:
    """The logits [B, steps, V] of each next token, where the next tokens are given."""
    added_BS, _ = right_aligned(prompts)
    steps = [next_logits(added_BS)]
    for place in range(NEW_TOKENS - 1):
        steps.append(next_logits(torch.tensor([[row[place]] for row in forced])))
    return torch.stack(steps, dim=1)


def together_and_alone(model: DecoderLM) -> tuple[Tensor, Tensor]:
    forced = torch.randint(
        100, (len(PROMPTS), NEW_TOKENS), generator=torch.Generator().manual_seed(1)
    ).tolist()
    _, padding = right_aligned(PROMPTS)
    together = logits_of(native_next_logits(model, 10 + NEW_TOKENS, CPU, padding), PROMPTS, forced)
    alone = [
        logits_of(native_next_logits(model, len(prompt) + NEW_TOKENS, CPU), [prompt], [row])
        for prompt, row in zip(PROMPTS, forced, strict=True)
    ]
    return together, torch.cat(alone)


@pytest.mark.parametrize("overrides", ATTENTION.values(), ids=ATTENTION.keys())
def test_a_text_s_logits_are_those_it_has_alone(overrides: list[str]) -> None:
    together, alone = together_and_alone(tiny_model(*overrides).eval())
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("position", ["rope", "learned", "alibi"])
@pytest.mark.parametrize("broken", ["positions", "mask"])
def test_the_comparison_notices_padding_that_counts(
    position: str, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    extend = generation._Alignment.extend

    def without(self: generation._Alignment, count: int) -> tuple[Tensor | None, Tensor | None]:
        positions, present = extend(self, count)
        return (None, present) if broken == "positions" else (positions, None)

    monkeypatch.setattr(generation._Alignment, "extend", without)
    together, alone = together_and_alone(tiny_model(*KINDS["position", position]).eval())
    # Distances in ALiBi, and rotations by one common angle, do not depend on where a text begins.
    is_seen = broken == "mask" or position == "learned"
    assert (float((together - alone).abs().max()) > 1e-2) == is_seen


def written(model: DecoderLM, prompts: list[list[int]], sampling: Sampling) -> list[list[int]]:
    _, padding = right_aligned(prompts)
    steps = continue_prompts(
        native_next_logits(model, max(map(len, prompts)) + NEW_TOKENS, CPU, padding),
        prompts,
        sampling,
    )
    return [list(row) for row in zip(*(next(steps) for _ in range(NEW_TOKENS)), strict=True)]


def test_a_sampled_text_depends_on_its_seed_and_not_on_its_neighbours() -> None:
    model, sampling = (
        tiny_model().eval(),
        Sampling(temperature=2.0, seed=5, top_k=30, repetition_penalty=1.2),
    )
    together = written(model, PROMPTS, sampling)
    alone = [
        written(model, [prompt], Sampling(**(vars(sampling) | {"seed": 5 + number})))[0]
        for number, prompt in enumerate(PROMPTS)
    ]
    assert together == alone == written(model, PROMPTS, sampling)
    assert written(model, PROMPTS, Sampling(**(vars(sampling) | {"seed": 50}))) != together
    twice = written(model, [PROMPTS[0], PROMPTS[0]], sampling)
    assert twice[0] == together[0] and twice[0] != twice[1]


def test_an_empty_prompt_among_others_is_refused() -> None:
    with pytest.raises(ConfigError, match="no tokens"):
        next(continue_prompts(lambda added_BS: torch.zeros(2, 5), [[1], []], Sampling()))
