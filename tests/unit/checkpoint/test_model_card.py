"""The model card: valid for the hub, honest about what is not known."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from pretrain.checkpoint.model_card import ETHICS, INTENDED_USE, LIMITS, NO_LICENSE, model_card
from pretrain.checkpoint.saved_state import wrong_type
from pretrain.checkpoint.state import CheckpointState, HardwareUse
from pretrain.config.load import load_recipe
from pretrain.core.shipped import recipe_names

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


USE: HardwareUse = {
    "device": "NVIDIA L4",
    "is_cpu": False,
    "devices": 4,
    "cores_per_device": 6,
    "starts": 3,
    "wall_seconds": 7200.0,
    "device_seconds": 28_800.0,
    "joules": 1.08e6,
    "covered_seconds": 21_600.0,
    "counters": ["NVML, GPUs"],
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


def used(settings: list[str], **changes: Any) -> str:
    """The section of hardware and energy of a card."""
    use: Any = {**USE, **changes}
    state: CheckpointState = {**STATE, "hardware": use}
    card = model_card(load_recipe("debug", settings), state)
    return card.split("## Hardware and energy\n")[1].split("\n## ")[0]


def test_measured_energy_is_extrapolated_to_the_hours_without_a_counter() -> None:
    section = used([])
    # 1.08 MJ over three quarters of the device hours are 1.44 MJ, 0.4 kWh.
    for line in (
        "| hardware, of the newest start | 4 devices: NVIDIA L4 |",
        "| device hours | 8.0000 |",
        "| wall hours | 2.0000 |",
        "| starts | 3 |",
        "| energy, kWh (measured) | 0.4000 |",
    ):
        assert f"\n{line}\n" in section
    assert "covered (75.0%)" in section and "NVML, GPUs" in section
    assert "carbon" not in section.lower()
    more = used(["card={power_usage_effectiveness: 1.5, grid_kg_per_kwh: 0.25}"])
    assert "| energy, kWh (measured) | 0.6000 |" in more
    assert "| carbon, kg of CO2 equivalent | 0.1500 |" in more and "0.25 kg/kWh" in more


def test_without_a_counter_energy_is_an_estimate_that_says_so() -> None:
    section = used(["card.watts_per_device=72"], joules=0.0, covered_seconds=0.0, counters=[])
    assert "| energy, kWh (an estimate, not measured) | 0.5760 |" in section
    assert "72 W per device (`card.watts_per_device`)" in section
    assert "350 W per device (a rough default" in used([], joules=0.0)
    cpu = used([], joules=0.0, is_cpu=True, cores_per_device=2, devices=1)
    assert "20 W per device (a rough default" in cpu
    assert "| 1 device: NVIDIA L4, 2 cores each |" in cpu
    assert "| energy, kWh (an estimate, not measured) | 0.1600 |" in cpu


def test_a_small_run_has_used_something() -> None:
    section = used([], joules=0.0, is_cpu=True, cores_per_device=1, devices=1, device_seconds=8.64)
    assert "| energy, kWh (an estimate, not measured) | 2.4e-05 |" in section
    assert "| device hours | 0.0024 |" in section and "1 core each" in section


def test_hardware_that_was_not_counted_is_not_invented() -> None:
    card = model_card(load_recipe("debug"), STATE)
    assert "## Hardware and energy\n\nNot recorded.\n" in card
    assert "Not recorded." in used([], device_seconds=0.0)


@pytest.mark.parametrize(
    "change",
    [
        {"joules": -1.0},
        {"device": 5},
        {"device_seconds": float("inf")},
        {"counters": "NVML"},
        {"starts": True},
    ],
)
def test_a_state_with_wrong_hardware_is_refused(change: dict[str, Any]) -> None:
    assert wrong_type({"step": 1, "hardware": {**USE, **change}}) is not None
    assert wrong_type({"step": 1, "hardware": USE}) is None
    assert wrong_type({"step": 1, "hardware": None}) is None


def test_texts_of_the_recipe_replace_the_defaults() -> None:
    card = model_card(
        load_recipe(
            "debug",
            ["card={ethics: Ours., limits: Few., intended_use: None., contact: a@example.org}"],
        ),
        STATE,
    )
    assert "\n## Ethics\n\nOurs.\n" in card and "\n## Contact\n\na@example.org\n" in card
    assert ETHICS not in card and LIMITS not in card
    assert "## Contact" not in model_card(load_recipe("debug"), STATE)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_has_a_whole_card_that_names_its_data(name: str) -> None:
    recipe = load_recipe(name)
    card = model_card(recipe, {"step": 0})
    for text in (INTENDED_USE, LIMITS, ETHICS):
        assert text in card
    sources: dict[str, Any] = {
        source: {"kind": section.kind, "documents": 1, "tokens": 1, "share": 1.0}
        for source, section in recipe.data.named_sources.items()
    }
    with_data = model_card(recipe, {"step": 0, "sources": sources})
    for source, section in recipe.data.named_sources.items():
        (row,) = (line for line in with_data.splitlines() if line.startswith(f"| {source} | "))
        known = section.kind in ("python_stdlib", "datasets")
        assert not row.endswith("| - |") or not known, row
