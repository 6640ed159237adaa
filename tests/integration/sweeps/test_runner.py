"""Slots, failures, interruptions and retries, with runs that take no time below the real
supervisor.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.core.files import only_writer
from pretrain.sweeps import launch
from pretrain.sweeps.axes import grid, parse_axis
from pretrain.sweeps.launch import (
    error_sentence,
    launch_command,
    launch_environment,
    metrics,
    slot_devices,
)
from pretrain.sweeps.progress import SweepProgress
from pretrain.sweeps.runner import Runner, StopRequest, listed_points
from pretrain.sweeps.study import Design, Study, base_mapping, is_written_to, try_lock
from tests.support.paths import LAUNCHERS, WORKERS

SIMULATED_TRAINING = WORKERS / "simulated_training.py"
RATES = [0.1, 0.01, 0.001]


@pytest.fixture
def new_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Study]:
    launchers = tmp_path / "launchers"
    launchers.mkdir()
    shutil.copy(LAUNCHERS / "supervise.py", launchers)
    shutil.copy(SIMULATED_TRAINING, launchers / "pretrain.py")
    monkeypatch.setattr(launch, "LAUNCHERS", launchers)

    def make(
        rates: list[float] = RATES, seconds: float = 0.0, *overrides: str, prune: bool = False
    ) -> Study:
        base = base_mapping("debug", list(overrides), 5 * 512)
        axes = {"optimizer.learning_rate": rates}
        design = Design(
            "sweep", "debug", base, axes, "grid", 0, 0, [], None, 1, {}, str(tmp_path), prune
        )
        study = Study(
            tmp_path / "sweep", design, grid([parse_axis("optimizer.learning_rate", rates)])
        )
        study.save()
        (study.output / "seconds").write_text(str(seconds))
        return study

    return make


def work(
    study: Study,
    slots: int = 1,
    stop: StopRequest | None = None,
    *,
    keep_going: bool = True,
    retry_failed: bool = False,
) -> bool:
    progress = SweepProgress(len(study.points), 5 * len(study.points), {}, {})
    try:
        return Runner(
            study,
            [[]] * slots,
            listed_points(study.points),
            stop or StopRequest(),
            progress,
            keep_going,
            retry_failed,
        ).run()
    finally:
        progress.close()


def states(study: Study) -> list[str]:
    return [study.record(point).state for point in study.points]


def starts(study: Study) -> list[int]:
    paths = [study.run_folder(point.run) / "starts.txt" for point in study.points]
    return [len(path.read_text().splitlines()) if path.is_file() else 0 for path in paths]


@pytest.mark.parametrize("slots", [1, 2])
def test_every_point_runs_once_and_a_second_time_nothing_does(
    new_study: Callable[..., Study], slots: int
) -> None:
    study = new_study()
    assert work(study, slots)
    assert states(study) == ["finished"] * 3 and starts(study) == [1, 1, 1]
    assert [study.record(point).loss for point in study.points] == pytest.approx([2.0, 1.0, 2.0])
    assert work(study, slots)
    assert starts(study) == [1, 1, 1]


def test_a_failure_is_recorded_with_its_sentence_and_code_and_the_others_go_on(
    new_study: Callable[..., Study],
) -> None:
    study = new_study([2.0, 0.01])
    assert work(study)
    failed, finished = (study.record(point) for point in study.points)
    assert (failed.state, failed.error) == (
        "failed",
        "the gradient of step 1 is not finite: lower optimizer.learning_rate",
    )
    assert failed.attempts[0]["exit_code"] == 6 and finished.state == "finished"
    assert work(study)
    assert starts(study) == [1, 1]
    assert work(study, retry_failed=True)
    assert starts(study) == [2, 1] and study.record(study.points[0]).state == "failed"


def test_a_run_that_a_guard_ended_early_has_finished(new_study: Callable[..., Study]) -> None:
    study = new_study([1e-6, 0.01])
    assert work(study)
    early = study.record(study.points[0])
    assert (
        states(study) == ["finished"] * 2
        and early.result is not None
        and early.result["steps"] == 2
    )
    assert early.loss == pytest.approx(17.0)


def test_without_keep_going_nothing_new_starts_after_a_failure(
    new_study: Callable[..., Study],
) -> None:
    study = new_study([2.0, 0.01])
    assert work(study, keep_going=False)
    assert states(study) == ["failed", "waiting"]


def test_a_stop_lets_runs_save_and_the_next_start_goes_on_from_there(
    new_study: Callable[..., Study],
) -> None:
    study, stop = new_study(seconds=0.4), StopRequest()
    points = listed_points(study.points)

    class StopsAtTheSecondStep(SweepProgress):
        def show(self, steps: dict[str, int]) -> None:
            stop.count = int(any(step >= 2 for step in steps.values()))

    progress = StopsAtTheSecondStep(3, 15, {}, {})
    assert not Runner(study, [[]], points, stop, progress).run()
    progress.close()
    assert states(study) == ["interrupted", "waiting", "waiting"]
    (study.output / "seconds").write_text("0")
    assert work(study)
    record = study.record(study.points[0])
    assert record.state == "finished" and [attempt["exit_code"] for attempt in record.attempts] == [
        75,
        0,
    ]
    assert record.attempts[1]["resumed_from_step"] >= 2
    assert [
        int(row["step"])
        for row in metrics(study.run_folder(record.point.run))
        if row["kind"] == "train"
    ] == [1, 2, 3, 4, 5]


def test_the_second_stop_kills(new_study: Callable[..., Study]) -> None:
    study, stop = new_study([0.01], seconds=30.0), StopRequest()

    class StopsTwice(SweepProgress):
        def show(self, steps: dict[str, int]) -> None:
            stop.count += 1

    progress, started = StopsTwice(1, 5, {}, {}), time.monotonic()
    assert not Runner(study, [[]], listed_points(study.points), stop, progress).run()
    progress.close()
    assert states(study) == ["interrupted"] and time.monotonic() - started < 20


def test_a_run_waits_for_the_process_that_still_holds_it(new_study: Callable[..., Study]) -> None:
    study = new_study([0.01])
    folder = study.point_folder(study.points[0].run)
    lock = try_lock(folder)
    assert lock is not None and try_lock(folder) is None
    # Handed to a child, the lock outlives this process's own descriptor.
    holder = subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock,)
    )
    os.close(lock)

    class LetsGo(SweepProgress):
        waited = False

        def show(self, steps: dict[str, int]) -> None:
            if not self.waited:
                assert starts(study) == [0]
                self.waited = True
                assert holder.stdin is not None
                holder.stdin.write(b"\n")
                holder.stdin.flush()

    progress = LetsGo(1, 5, {}, {})
    assert Runner(study, [[]], listed_points(study.points), StopRequest(), progress).run()
    progress.close()
    assert holder.wait() == 0 and progress.waited and states(study) == ["finished"]


def test_a_folder_that_training_writes_to_is_seen_from_outside(tmp_path: Path) -> None:
    assert not is_written_to(tmp_path / "run")
    with only_writer(tmp_path / "run", "wait"):
        assert is_written_to(tmp_path / "run")
    assert not is_written_to(tmp_path / "run")


def test_a_run_that_ended_when_the_sweep_was_killed_is_taken_over_without_a_start(
    new_study: Callable[..., Study],
) -> None:
    study = new_study([0.01])
    assert work(study)
    record = study.record(study.points[0])
    record.state, record.result = "running", None
    study.write(record)
    assert work(study)
    assert states(study) == ["finished"] and starts(study) == [1]
    (study.point_folder(record.point.run) / "result.json").write_text('{"steps": 4')
    record.state = "running"
    study.write(record)
    assert work(study)
    assert starts(study) == [2]


def test_runs_below_the_median_are_ended_and_their_place_is_not_taken_again(
    new_study: Callable[..., Study],
) -> None:
    study = new_study([0.01, 0.02, 0.005, 0.012, 0.5, 0.011], 0.0, prune=True)
    good, bad, last = study.points[:4], study.points[4], study.points[5]
    for point in good:
        assert Runner(
            study, [[]], listed_points([point]), StopRequest(), SweepProgress(1, 5, {}, {})
        ).run()
    (study.output / "seconds").write_text("0.5")
    assert work(study)
    assert [study.record(point).state for point in (*good, bad, last)] == ["finished"] * 4 + [
        "pruned",
        "finished",
    ]
    assert len(study.record(bad).validation) < 5 and starts(study) == [1] * 6
    assert work(study)
    assert starts(study) == [1] * 6


def test_a_supervisor_whose_parent_is_gone_asks_the_run_to_save(
    new_study: Callable[..., Study], tmp_path: Path
) -> None:
    study = new_study([0.01], seconds=1.0)
    folder = study.run_folder(study.points[0].run)
    command = launch_command(study, study.points[0], [])
    index = command.index("--parent") + 1
    starter = (
        "import os, subprocess, sys; c = sys.argv[1:]; c[c.index('--parent') + 1] ="
        " str(os.getpid()); subprocess.Popen(c); input()"
    )
    study.point_folder(study.points[0].run).mkdir(parents=True)
    parent = subprocess.Popen([sys.executable, "-c", starter, *command], stdin=subprocess.PIPE)
    assert command[index] == str(os.getpid())
    deadline = time.monotonic() + 60
    while not (folder / "saved").is_file() and time.monotonic() < deadline:
        time.sleep(0.02)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    time.sleep(2.5)
    saved = int((folder / "saved").read_text())
    assert saved < 5
    time.sleep(1.2)
    assert int((folder / "saved").read_text()) == saved
    assert not (study.point_folder(study.points[0].run) / "result.json").exists()


def test_launches_share_cores_and_devices_and_know_nothing_of_a_launcher_above(
    monkeypatch: pytest.MonkeyPatch, new_study: Callable[..., Study]
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    environment = launch_environment(slots=2, ranks=1, devices=["5"])
    assert "RANK" not in environment and (
        environment["OMP_NUM_THREADS"],
        environment["CUDA_VISIBLE_DEVICES"],
    ) == ("4", "5")
    study = new_study([0.01])
    assert not any(map(is_launcher, launch_command(study, study.points[0], ["5"])))
    two = Study(study.output, Design(**(vars(study.design) | {"ranks": 2})), study.points)
    assert options(launch_command(two, two.points[0], ["4", "5"])) == ["--include", "localhost:4,5"]
    assert options(launch_command(two, two.points[0], [])) == ["--num_accelerators", "2"]


def is_launcher(word: str) -> bool:
    return Path(word).name == "deepspeed_launcher.py"


def options(words: list[str]) -> list[str]:
    """The first option of the launcher, and its value."""
    place = next(number for number, word in enumerate(words) if is_launcher(word))
    return words[place + 1 : place + 3]


def test_gpus_are_shared_among_slots() -> None:
    assert slot_devices([], None, 2) == [[]] and slot_devices([], 3, 2) == [[], [], []]
    assert slot_devices(["0", "1", "2", "3"], None, 2) == [["0", "1"], ["2", "3"]]
    with pytest.raises(launch.ConfigError, match="need 8 GPUs, but there are 4"):
        slot_devices(["0", "1", "2", "3"], 4, 2)


def test_a_failure_is_told_by_its_sentence_else_by_its_code_and_last_line() -> None:
    assert error_sentence("x\nerror: one\nerror: two\n", 2) == "two"
    bar = "\rtraining:   0%|    | 0/10 [00:00<?, ?step/s]"
    assert (
        error_sentence(f"{bar}error: the gradient is not finite\n{bar}\n", 6)
        == "the gradient is not finite"
    )
    assert (
        error_sentence("Traceback\nKeyError: 'a'\n", 1) == "ended with exit code 1: KeyError: 'a'"
    )
    assert error_sentence("", 137) == "ended with exit code 137: it printed nothing"


def test_only_whole_rows_of_a_growing_table_are_read(tmp_path: Path) -> None:
    (tmp_path / "training_log.csv").write_text(
        "kind,step,validation_loss\r\ntrain,1,\r\nvalidation,1,2.5\r\ntrain,2"
    )
    assert metrics(tmp_path) == [
        {"kind": "train", "step": "1", "validation_loss": ""},
        {"kind": "validation", "step": "1", "validation_loss": "2.5"},
    ]
    assert [row["step"] for row in metrics(tmp_path, last_bytes=30)] == ["1"]
    assert metrics(tmp_path / "absent") == []
    assert json.dumps(metrics(tmp_path, 1 << 20)) == json.dumps(metrics(tmp_path))
