"""A number has one owner: "auto" is filled from the recipe, and a clash names both places."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from pretrain.config.load import load_recipe
from pretrain.core.errors import ConfigError
from pretrain.engine.ds_config import read_ds_config, resolve_ds_config, zero_stage_of
from tests.support.paths import DS_CONFIGS

ORIGIN = "my.json"
FP32_SUMS = {"data_types": {"grad_accum_dtype": "float32"}}


def resolve(ds_config: dict[str, Any], *overrides: str, precision: str = "bf16") -> dict[str, Any]:
    return resolve_ds_config(
        ds_config,
        ORIGIN,
        load_recipe("debug", list(overrides)),
        precision,
        accumulation_steps=2,
        world_size=2,
    )


@pytest.mark.parametrize("given", ["auto", "left out", "the same"])
def test_what_the_recipe_owns_is_filled(given: str) -> None:
    values = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
    }
    choices: dict[str, dict[str, Any]] = {
        "auto": dict.fromkeys(values, "auto"),
        "left out": {},
        "the same": values,
    }
    stated = choices[given]
    ds_config = {
        "zero_optimization": {"stage": 2, "overlap_comm": False},
        "bf16": {"enabled": "auto"},
        **stated,
    }
    before = copy.deepcopy(ds_config)
    resolved = resolve(ds_config)
    assert {key: resolved[key] for key in values} == values
    assert (
        resolved["bf16"] == {"enabled": True, "check_grad_overflow": True}
        and resolved["fp16"]["enabled"] is False
    )
    assert resolved["tensorboard"] == {
        "enabled": True,
        "output_path": "runs/debug",
        "job_name": "tensorboard",
    }
    assert resolved["zero_optimization"] == {"stage": 2, "overlap_comm": False}
    assert ds_config == before


@pytest.mark.parametrize(
    "precision,expected",
    [("fp32", (False, False)), ("bf16", (True, False)), ("fp16", (False, True))],
)
def test_precision_switches_one_section_on(precision: str, expected: tuple[bool, bool]) -> None:
    resolved = resolve({"fp16": {"initial_scale_power": 8}}, precision=precision)
    assert (resolved["bf16"]["enabled"], resolved["fp16"]["enabled"]) == expected
    assert resolved["fp16"]["initial_scale_power"] == 8


@pytest.mark.parametrize(
    "ds_config,parts",
    [
        ({"train_batch_size": 9}, ["'train_batch_size' is 9", "train.global_batch_size says 8"]),
        (
            {"train_micro_batch_size_per_gpu": 1},
            ["'train_micro_batch_size_per_gpu' is 1", "train.micro_batch_size says 2"],
        ),
        (
            {"gradient_accumulation_steps": 4},
            ["'gradient_accumulation_steps' is 4", "2 ranks says 2"],
        ),
        ({"gradient_clipping": 0.5}, ["'gradient_clipping' is 0.5", "train.grad_clip says 1.0"]),
        ({"fp16": {"enabled": True}}, ["'fp16.enabled' is True", "train.precision says False"]),
        (
            {"bf16": {"check_grad_overflow": False}},
            ["'bf16.check_grad_overflow' is False", "guards.non_finite says True"],
        ),
        (
            {"tensorboard": {"output_path": "elsewhere"}},
            ["'tensorboard.output_path' is 'elsewhere'", "run_path says 'runs/debug'"],
        ),
        (
            {"optimizer": {"type": "Adam"}},
            ["'optimizer' is owned by the recipe's 'optimizer'", "remove it"],
        ),
        (
            {"scheduler": {"type": "WarmupLR"}},
            ["'scheduler' is owned by the recipe's 'schedule'", "remove it"],
        ),
        (
            {"zero_optimization": {"stage": 1, "compute_grad_norm": False}},
            ["zero_optimization.compute_grad_norm must stay true", "leave it out"],
        ),
        (
            {"data_types": {"grad_accum_dtype": "fp64"}},
            ["'data_types.grad_accum_dtype' is \"fp64\"", "it must be", '"bf16"'],
        ),
        (
            {"zero_optimization": {"stage": 1}} | FP32_SUMS,
            [
                "data_types.grad_accum_dtype is 'float32'",
                "at ZeRO stage 1",
                "zero2.json or zero3.json",
            ],
        ),
        (FP32_SUMS, ["at ZeRO stage 0", "zero2.json or zero3.json"]),
        ({"zero_optimization": {"stage": 4}}, ["'zero_optimization.stage' is 4", "0, 1, 2 or 3"]),
    ],
)
def test_a_clash_names_both_places(ds_config: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(ds_config)
    for part in (ORIGIN, *parts):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "zero,precision",
    [
        ({"stage": 2}, "bf16"),
        ({"stage": 3}, "bf16"),
        ({"stage": 1, "offload_optimizer": {"device": "cpu"}}, "bf16"),
        ({"stage": 1}, "fp16"),
    ],
)
def test_gradients_are_summed_in_fp32_where_deepspeed_can(
    zero: dict[str, Any], precision: str
) -> None:
    assert (
        resolve({"zero_optimization": zero} | FP32_SUMS, precision=precision)["data_types"]
        == FP32_SUMS["data_types"]
    )
    assert resolve({"data_types": {"grad_accum_dtype": None}})["data_types"] == {
        "grad_accum_dtype": None
    }


def test_optimizer_and_scheduler_may_say_auto() -> None:
    resolved = resolve({"optimizer": "auto", "scheduler": "auto"})
    assert "optimizer" not in resolved and "scheduler" not in resolved


@pytest.mark.parametrize(
    "ds_config,clipping",
    [
        ({}, 0.0),
        ({"zero_optimization": {"stage": 0}}, 0.0),
        ({"zero_optimization": {"stage": 1}}, 1.0),
    ],
)
def test_deepspeeds_own_clipping_is_off_at_stage_0_only(
    ds_config: dict[str, Any], clipping: float
) -> None:
    """At stage 0 it averages the norms of ranks with different experts; our engine clips there."""
    assert resolve(ds_config)["gradient_clipping"] == clipping


def test_policy_of_the_file_is_kept() -> None:
    resolved = resolve(
        {"prescale_gradients": True, "steps_per_print": 5, "comms_logger": {"enabled": True}}
    )
    assert (
        resolved["prescale_gradients"],
        resolved["steps_per_print"],
        resolved["comms_logger"],
    ) == (True, 5, {"enabled": True})


@pytest.mark.parametrize(
    "text,part",
    [
        ("{", "is not valid JSON"),
        ("[1]", "must hold a JSON object"),
        ("\ufeff{}", "is not valid JSON"),
    ],
)
def test_a_file_that_is_no_json_object_is_named(tmp_path: Path, text: str, part: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=part) as caught:
        read_ds_config(str(path))
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"none\.json: No such file.*shipped ones are zero0, zero1"
    ):
        read_ds_config(str(tmp_path / "none.json"))


def test_a_shipped_file_is_found_by_name_and_a_file_of_the_user_s_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = DS_CONFIGS / "zero2.json"
    monkeypatch.chdir(tmp_path)
    assert read_ds_config("zero2") == read_ds_config(str(shipped))
    (tmp_path / "zero2").write_text('{"zero_optimization": {"stage": 3}}')
    assert read_ds_config("zero2") == read_ds_config(str(shipped))  # a stray file changes nothing
    assert read_ds_config("./zero2") == {"zero_optimization": {"stage": 3}}


def test_stage_is_0_where_the_file_says_nothing() -> None:
    assert zero_stage_of({}, ORIGIN) == 0
    assert zero_stage_of({"zero_optimization": {"stage": 3}}, ORIGIN) == 3


def test_fp8_runs_in_deepspeed_s_bf16_mode_with_its_overflow_check() -> None:
    """Without it, stages 1 and 2 apply gradients that are not finite, and a veto has no effect."""
    recipe = load_recipe("debug", ["train.precision=fp8"])
    checked = resolve_ds_config({}, "ds.json", recipe, "fp8", 2, 2)["bf16"]
    assert checked == {"enabled": True, "check_grad_overflow": True}
    switched_off = {"bf16": {"check_grad_overflow": False}}
    with pytest.raises(ConfigError, match="guards.non_finite says True"):
        resolve_ds_config(switched_off, "ds.json", recipe, "fp8", 2, 2)
