"""The account of hardware: hours over all starts, and the energy that counters have seen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pretrain.engine.topology import Topology
from pretrain.training import hardware
from pretrain.training.hardware import ACCOUNT, HardwareMeter, read_account

CPU = torch.device("cpu")


class Counter:
    """A counter of energy that the test sets."""

    name = "a counter"

    def __init__(self) -> None:
        self.value = 0.0
        self.fails = False

    def joules(self) -> float:
        if self.fails:
            raise OSError("gone")
        return self.value


class World:
    """A machine whose clock, processes and counter the test moves."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.now = 1000.0
        self.created = 1000.0
        self.counter: Counter | None = None
        monkeypatch.setattr(hardware.time, "time", lambda: self.now)
        monkeypatch.setattr(hardware.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(hardware, "processor_counter", lambda: self.counter)
        process = type("P", (), {"create_time": lambda _: self.created})
        monkeypatch.setattr(hardware.psutil, "Process", process)

    def start(self, ranks: int, startup: float) -> HardwareMeter:
        self.created = self.now
        self.now += startup
        meter = HardwareMeter(self.folder, AloneOf(0, ranks, 1, CPU))
        meter.begin()
        return meter


class AloneOf(Topology):
    """A rank whose sums over all ranks are as if every rank had what it has."""

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.mul_(self.world_size)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


def test_hours_add_up_over_starts_of_other_sizes_and_lost_work_counts(world: World) -> None:
    meter = world.start(ranks=2, startup=10.0)
    world.now += 50.0
    meter.note()
    world.now += 500.0  # killed after its last note, and down
    meter = world.start(ranks=3, startup=20.0)
    world.now += 5.0
    meter.note()
    use = meter.measure()
    assert use is not None and (use["starts"], use["devices"]) == (2, 3)
    assert use["wall_seconds"] == pytest.approx(60.0 + 25.0)
    assert use["device_seconds"] == pytest.approx(2 * 60.0 + 3 * 25.0)
    assert use["joules"] == 0.0 and use["counters"] == []
    # A start with nothing to do reports the same.
    assert HardwareMeter(world.folder, AloneOf(0, 1, 1, CPU)).measure() == use


def test_the_clock_may_go_back(world: World) -> None:
    meter = world.start(ranks=1, startup=10.0)
    world.now -= 1e6
    meter.note()
    use = meter.measure()
    assert use is not None and use["wall_seconds"] == pytest.approx(10.0)


def test_energy_is_summed_over_ranks_and_starts(world: World) -> None:
    world.counter = Counter()
    meter = world.start(ranks=2, startup=10.0)
    world.now += 40.0
    world.counter.value = 7.0
    meter.share()
    world.counter = Counter()
    world.now += 60.0
    meter = world.start(ranks=2, startup=10.0)
    world.now += 20.0
    world.counter.value = 3.0
    meter.share()
    use = meter.measure()
    assert use is not None and use["counters"] == ["a counter"]
    assert use["joules"] == pytest.approx(2 * 7.0 + 2 * 3.0)
    # Counters begin after the startup, which the device hours hold.
    assert use["covered_seconds"] == pytest.approx(2 * 40.0 + 2 * 20.0)
    assert use["device_seconds"] == pytest.approx(2 * 50.0 + 2 * 30.0)


def test_a_counter_that_fails_keeps_what_it_saw(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.counter = Counter()
    meter = world.start(ranks=1, startup=0.0)
    world.now += 10.0
    world.counter.value = 5.0
    meter.note()
    world.counter.fails = True
    world.now += 90.0
    for _ in range(3):
        meter.share()
    use = meter.measure()
    assert use is not None and use["joules"] == 5.0
    assert use["covered_seconds"] == pytest.approx(10.0)
    assert use["device_seconds"] == pytest.approx(100.0)
    assert len(caplog.records) == 1


def test_a_long_time_without_a_look_at_the_counter_is_not_covered(world: World) -> None:
    world.counter = Counter()
    meter = world.start(ranks=1, startup=0.0)
    world.now += 10.0
    world.counter.value = 5.0
    meter.share()
    # It may have begun again in the meantime.
    world.now += 3600.0
    world.counter.value = 6.0
    meter.share()
    world.now += 20.0
    world.counter.value = 8.0
    meter.share()
    use = meter.measure()
    assert use is not None and use["joules"] == 7.0
    assert use["covered_seconds"] == pytest.approx(30.0)
    assert use["device_seconds"] == pytest.approx(3630.0)


def test_processors_alone_are_not_the_energy_of_a_gpu(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.counter = Counter()
    gpu: Counter | None = None
    monkeypatch.setattr(hardware, "gpu_counter", lambda device: gpu)
    assert hardware.RankEnergy(torch.device("cuda", 0), local_rank=0).counters == []
    gpu = Counter()
    gpu.name = "a GPU"
    both = hardware.RankEnergy(torch.device("cuda", 0), local_rank=0)
    assert both.counters == ["a GPU", "a counter"]
    # The machine's processors count once.
    assert hardware.RankEnergy(torch.device("cuda", 1), local_rank=1).counters == ["a GPU"]
    gpu.value, world.counter.value = 2.0, 3.0
    both.note()
    assert both.joules == 5.0


@pytest.mark.parametrize("content", ["", "{", "[]", '{"device": "x"}', '{"starts": -1}', "null"])
def test_a_damaged_account_begins_anew(world: World, content: str) -> None:
    meter = world.start(ranks=1, startup=5.0)
    assert read_account(world.folder) is not None
    (world.folder / ACCOUNT).write_text(content)
    meter = world.start(ranks=1, startup=5.0)
    use = meter.measure()
    assert use is not None and use["starts"] == 1 and use["wall_seconds"] == 5.0


def test_other_ranks_keep_no_account(world: World) -> None:
    meter = HardwareMeter(None, AloneOf(1, 2, 1, CPU))
    meter.begin()
    meter.note()
    meter.share()
    assert meter.measure() is None and list(world.folder.iterdir()) == []


def test_this_machine_has_a_name() -> None:
    assert hardware.device_name(CPU)
