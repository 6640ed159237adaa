"""The model card: valid for the hub, honest about what is not known."""

from __future__ import annotations

from typing import Any

import yaml

from pretrain.checkpoint.model_card import LIMITS, NO_LICENSE, model_card
from pretrain.checkpoint.state import CheckpointState
from pretrain.config.load import load_recipe

STATE: CheckpointState = {
    "step": 30,
    "consumed_tokens": 7680,
    "epoch": 0.31,
    "validation_loss": 2.0,
    "validation_step": 25,
    "validation_targets": 4096,
    "progress": {"best_validation": 1.5, "best_step": 20},
    "parameters": {"total": 38080, "active": 31936},
    "sources": {
        "web|text": {"kind": "text", "documents": 3, "tokens": 7500, "share": 0.75},
        "code": {"kind": "jsonl", "documents": 1, "tokens": 2500, "share": 0.25},
    },
}


def front_matter(card: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return content


def test_it_has_sources_shares_origins_parameters_and_results() -> None:
    recipe = load_recipe(
        "debug",
        [
            "card={license: mit, intended_use: For tests., data_origin: {code: 'The Stack,"
            " permissive'}}"
        ],
    )
    card = model_card(recipe, STATE, {"hellaswag/acc": 0.25})
    assert front_matter(card) == {
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": ["pretraining", "mixture-of-experts"],
    }
    for line in (
        "| web\\|text | text | 3 | 7,500 | 0.7500 | - |",
        "| code | jsonl | 1 | 2,500 | 0.2500 | The Stack, permissive |",
        "| validation loss, nats a token, at step 25, over 4,096 tokens | 2.0000 |",
        "| validation perplexity, at step 25 | 7.3891 |",
        "| best validation loss, at step 20 | 1.5000 |",
        "| hellaswag/acc | 0.2500 |",
        "For tests.",
        LIMITS,
        "mit",
    ):
        assert f"\n{line}\n" in card
    assert "38,080 parameters, of which a token uses 31,936" in card and "on 7,680 tokens" in card


def test_without_a_licence_none_is_claimed() -> None:
    card = model_card(load_recipe("debug"), STATE)
    assert "license" not in front_matter(card) and NO_LICENSE in card


def test_it_says_what_the_weights_started_from() -> None:
    card = model_card(
        load_recipe(
            "debug", ["initial_weights=/models/olmoe", "card.base_model=allenai/OLMoE-1B-7B-0924"]
        ),
        STATE,
    )
    assert (
        front_matter(card)["base_model"] == "allenai/OLMoE-1B-7B-0924"
        and "\n| initial weights | /models/olmoe |\n" in card
    )
    assert "\n| continues from | runs/trunk/checkpoints/step_9 |\n" in model_card(
        load_recipe("debug", ["branch_from=runs/trunk/checkpoints/step_9"]), STATE
    )
    card = model_card(load_recipe("debug"), STATE)
    assert (
        "base_model" not in front_matter(card)
        and "continues from" not in card
        and "initial weights" not in card
    )


def test_weights_of_no_run_of_ours_claim_no_tokens_data_or_results() -> None:
    card = model_card(load_recipe("debug"), {"step": 0, "consumed_tokens": 0, "data": {}})
    assert "Not recorded." in card and "None were measured." in card
    assert "pretrained on" not in card and "| steps |" not in card
