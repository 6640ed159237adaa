"""Counters of energy: what they add up, and machines without any."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch

from pretrain.engine.energy import (
    NVML,
    RAPL,
    RaplCounter,
    gpu_counter,
    processor_counter,
    read_joules,
)

RANGE = 1_000_000


def zone(folder: Path, name: str, label: str, microjoules: int) -> Path:
    path = folder / name
    path.mkdir()
    (path / "name").write_text(f"{label}\n")
    (path / "max_energy_range_uj").write_text(f"{RANGE}\n")
    (path / "energy_uj").write_text(f"{microjoules}\n")
    return path / "energy_uj"


def test_packages_add_up_over_the_end_of_their_range_and_parts_do_not_count_twice(
    tmp_path: Path,
) -> None:
    first = zone(tmp_path, "intel-rapl:0", "package-0", 100)
    second = zone(tmp_path, "intel-rapl:1", "package-1", RANGE - 50)
    core = zone(tmp_path, "intel-rapl:0:0", "core", 0)
    platform = zone(tmp_path, "intel-rapl:2", "psys", 0)
    counter = RaplCounter(tmp_path)
    assert counter.joules() == 0.0
    first.write_text("400\n")
    core.write_text("999\n")
    platform.write_text("999\n")
    assert counter.joules() == pytest.approx(300e-6)
    # It has begun again at 0 after its largest value.
    second.write_text("150\n")
    assert counter.joules() == pytest.approx(500e-6)
    assert counter.joules() == pytest.approx(500e-6)


def test_a_machine_without_readable_packages_has_no_counter(tmp_path: Path) -> None:
    assert processor_counter(tmp_path / "nowhere") is None
    zone(tmp_path, "intel-rapl:0", "psys", 1)
    assert processor_counter(tmp_path) is None
    zone(tmp_path, "intel-rapl:1", "package-0", 1).write_text("no number\n")
    assert processor_counter(tmp_path) is None


def test_a_counter_that_disappears_counts_no_more(tmp_path: Path) -> None:
    path = zone(tmp_path, "intel-rapl:0", "package-0", 1)
    counter = processor_counter(tmp_path)
    assert counter is not None and counter.name == RAPL and read_joules(counter) == 0.0
    path.unlink()
    assert read_joules(counter) is None and read_joules(None) is None


class FakeNvml(types.ModuleType):
    """What pynvml has of the functions that are used, for one GPU."""

    def __init__(self, uuid: str) -> None:
        super().__init__("pynvml")
        self.uuid = uuid
        self.millijoules = 5_000

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != self.uuid:
            raise RuntimeError("Not Found")
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        if self.millijoules < 0:
            raise RuntimeError("Not Supported")
        return self.millijoules


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml("GPU-abc")
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    properties = types.SimpleNamespace(uuid="abc")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return fake


def test_a_gpu_counts_from_its_first_use_and_is_found_by_its_uuid(nvml: FakeNvml) -> None:
    device = torch.device("cuda", 3)
    counter = gpu_counter(device)
    assert counter is not None and counter.name == NVML and counter.joules() == 0.0
    nvml.millijoules = 12_500
    assert counter.joules() == pytest.approx(7.5)
    assert gpu_counter(torch.device("cpu")) is None


def test_a_gpu_that_nvml_does_not_count_has_no_counter(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml.millijoules = -1
    assert gpu_counter(torch.device("cuda", 0)) is None
    nvml.uuid = "GPU-other"
    assert gpu_counter(torch.device("cuda", 0)) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpu_counter(torch.device("cuda", 0)) is None


def test_the_real_package_has_the_functions_that_are_used() -> None:
    pynvml = pytest.importorskip("pynvml")
    for name in vars(FakeNvml):
        if name.startswith("nvml"):
            assert callable(getattr(pynvml, name))
