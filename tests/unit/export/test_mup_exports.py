"""muP changes weights and learning rates and nothing that a model computes: every target takes what
it would take without it.
"""

from __future__ import annotations

import pytest

from pretrain.config.load import load_recipe
from pretrain.export.features import reasons_against
from pretrain.export.targets import choose_target, representable

BASE = (
    "{hidden_size: 64, num_attention_heads: 1, num_key_value_heads: 1, moe_intermediate_size: 128}"
)
MUP = f"model.initialization={{kind: mup, base: {BASE}}}"


@pytest.mark.parametrize(
    "overrides,target",
    [
        ([], "qwen3_moe"),
        (["model.tie_word_embeddings=true"], "qwen3_moe"),
        (["model.embedding_size=32"], "custom"),
    ],
)
def test_each_target_takes_a_model_whatever_its_initialisation_was(
    overrides: list[str], target: str
) -> None:
    standard, mup = (
        load_recipe("quickstart", ["model.vocab_size=300", *overrides, *kind])
        for kind in ([], [MUP])
    )
    assert representable(mup) == representable(standard)
    assert representable(mup)[target] == [] and choose_target(mup, target).name == target
    assert mup.model.initialization != standard.model.initialization


def test_only_the_initialisation_is_passed_over() -> None:
    model = load_recipe("quickstart", ["model.vocab_size=300", MUP]).model
    against = reasons_against(model, {}, "nothing")
    assert against and not [reason for reason in against if "initialization" in reason]
