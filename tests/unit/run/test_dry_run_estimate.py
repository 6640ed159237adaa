"""--dry-run's estimate of the time: for a GPU that is named, and none if nothing is known."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.core.accelerators import ACCELERATORS, accelerator, accelerator_of_device
from pretrain.core.errors import ConfigError
from pretrain.train import main
from tests.support.tiny_run import Tiny

Plan = Callable[..., dict[str, Any]]


@pytest.fixture
def plan(tiny: Tiny, tmp_path: Path, in_process: None) -> Plan:
    """The plan of the tiny recipe with more options, as JSON."""

    def make(*options: str) -> dict[str, Any]:
        path = tmp_path / "plan.json"
        arguments = [*tiny.arguments(tmp_path / "run", "train.precision=auto"), *options]
        assert main([*arguments, "--dry-run", "--world-size", "2", "--json", str(path)]) == 0
        result: dict[str, Any] = json.loads(path.read_text())
        return result

    return make


def test_the_time_on_a_named_gpu_is_flops_over_peak_and_the_stated_mfu(plan: Plan) -> None:
    made = plan("--gpu", "h100", "--mfu", "0.5")
    flops = made["train_tokens"] * made["flops_per_token"]
    assert made["estimated_seconds"] == pytest.approx(flops / (989e12 * 0.5 * 2))
    assert made["precision"] == "bf16"
    assert "assuming an MFU of 0.5 on 2 x H100" in made["estimate_basis"]
    assert plan("--gpu", "A100")["estimated_seconds"] == pytest.approx(flops / (312e12 * 0.35 * 2))


def test_fp32_has_a_peak_of_its_own(plan: Plan) -> None:
    single = plan("--gpu", "H100", "--set", "train.precision=fp32")
    half = plan("--gpu", "H100")
    assert single["estimated_seconds"] / half["estimated_seconds"] == pytest.approx(989 / 67)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU")
def test_without_a_gpu_there_is_no_estimate_but_what_to_give_for_one(
    plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    made = plan()
    assert made["estimated_seconds"] is None and "--gpu NAME (A100, " in made["estimate_basis"]
    printed = capsys.readouterr().out
    assert "days" not in printed and "--gpu" in printed


def test_the_table_says_whether_the_run_fits_into_the_gpu(
    plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    plan("--gpu", "L4")
    assert "fits in the 24 GB of one L4" in " ".join(
        capsys.readouterr().out.replace("│", "").split()
    )


@pytest.mark.parametrize(
    "options,message",
    [
        (["--gpu", "H1000"], r"'H1000' is not known.*mean H100\?.*Known are A100, .*MI300X"),
        (["--gpu", "H100", "--mfu", "35"], "--mfu 35 is no share"),
    ],
)
def test_what_cannot_be_is_refused(plan: Plan, options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(*options)


def test_names_are_found_however_they_are_written_and_devices_by_torch_s_names() -> None:
    assert accelerator("rtx-4090") is accelerator("RTX 4090")
    assert {known.name for known in ACCELERATORS} >= {"A100", "H100", "H200", "B200", "L40S"}
    for device, name in (
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("AMD Instinct MI300X", "MI300X"),
    ):
        assert accelerator_of_device(device) is accelerator(name)
    for other in (
        "Some other device",
        "NVIDIA L40",
        "NVIDIA RTX A1000",
        "NVIDIA H100 PCIe",
        "NVIDIA H200 NVL",
        "NVIDIA GH200 480GB",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
    ):
        assert accelerator_of_device(other) is None, other
    assert accelerator_of_device("NVIDIA A100-SXM4-80GB") is accelerator("A100")


def test_a_gpu_without_fp8_is_planned_for_no_fp8(plan: Plan) -> None:
    assert (
        "TFLOP/s in bf16" in plan("--gpu", "H100", "--set", "train.precision=fp8")["estimate_basis"]
    )
    with pytest.raises(ConfigError, match="A100 has no fp8"):
        plan("--gpu", "A100", "--set", "train.precision=fp8")


def test_tf32_has_no_estimate_and_an_offloaded_state_no_verdict(
    plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    precise = ("--gpu", "A100", "--set", "train.precision=fp32")
    assert plan(*precise)["estimated_seconds"] > 0
    assert plan(*precise, "--set", "train.tf32=true")["estimated_seconds"] is None
    capsys.readouterr()
    plan("--gpu", "H100", "--ds_config", "zero3_offload")
    printed = capsys.readouterr().out
    assert "offloaded to the host" in printed and "fits" not in printed
