"""A save that is killed, or that finds the disk full, at any of its events."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from pretrain.checkpoint.layout import complete_checkpoints, damage
from pretrain.core.errors import PEER_LOST
from pretrain.core.faults import SITES
from pretrain.engine.topology import free_port
from tests.support.ranks import Results, run_cases
from tests.support.tiny_run import SCRIPT, Started, Tiny, curve
from tests.support.workers.crash_points import STORAGE_ERROR

EVENTS = [site for site in SITES if site.startswith("save.")]
# A file is flushed at each pass of this event: weights, optimizer, rank, then the shared ones.
SYNCS = 8
# From here on the new checkpoint has its name.
PUBLISHED = ("save.pointer", "save.remove_old", "save.end")
CASES = [
    (kind, site, number, background)
    for kind in ("kill", "enospc")
    for site in EVENTS
    for number in (range(1, SYNCS + 1) if site == "save.sync" else (1,))
    # Taken before and after the writing of files, the snapshot and the end raise nothing to catch.
    if kind == "kill" or site.startswith(("save.write", "save.sync", "save.manifest"))
    for background in ((False, True) if number == 1 else (True,))
    # Without a background there is no snapshot to take, but its event comes all the same.
]


def name_of(kind: str, site: str, number: int, background: bool) -> str:
    return f"{kind}@{site}:{number} {'background' if background else 'waiting'}"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("crash_points")
    cases = [
        {
            "name": name_of(*case),
            "folder": str(folder / f"{index}"),
            "fault": f"{case[0]}@{case[1]}:{case[2]}",
            "background": case[3],
        }
        for index, case in enumerate(CASES)
    ]
    return run_cases("crash_points", cases, 1, folder / "ranks")


@pytest.mark.parametrize("case", CASES, ids=[name_of(*case) for case in CASES])
def test_a_whole_checkpoint_is_left_and_the_next_save_clears_up(
    case: tuple[str, str, int, bool], results: Results
) -> None:
    kind, site, _, _ = case
    found = results[name_of(*case)]
    assert found["code"] == (-9 if kind == "kill" else STORAGE_ERROR)
    # The older checkpoint is whole until the new one is there, and the new one is never torn.
    assert not any(found["damage"])
    expected = "step_2" if site in PUBLISHED else "step_1"
    assert found["newest"] == expected and found["step"] == int(expected[-1])
    assert found["is_first"] == (expected == "step_1")
    if kind == "enospc":
        assert found["torn"] == [], "the space of a save that failed is free again"
    assert found["after"] == ["latest", "step_3"]


# Events that rank 0 alone passes, and files that each of two ranks flushes in one save.
OF_RANK_0 = (
    "save.write_shared",
    "save.manifest",
    "save.rename",
    "save.pointer",
    "save.remove_old",
)
SYNCS_OF_RANK = (SYNCS, 3)
# Of the second save.
KILLS = [
    (site, rank, passes + number)
    for site in EVENTS
    for rank in ((0,) if site in OF_RANK_0 else (0, 1))
    for passes in (SYNCS_OF_RANK[rank] if site == "save.sync" else 1,)
    for number in range(1, passes + 1)
]
ALWAYS = (("save.snapshot", 1, 2), ("save.write_optimizer", 0, 2), ("save.rename", 0, 2))


def start_two(tiny: Tiny, run: Path, fault: str) -> list[Started]:
    """Two ranks without a launcher, which would end the one when the other does."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    settings = ("parallel.ep_size=2", "checkpoint.interval_steps=1", "checkpoint.keep_last=1")
    command = [sys.executable, SCRIPT, *tiny.arguments(run, *settings, steps=4)]
    return [
        Started(
            command,
            run.parent,
            shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "FAULT": fault},
        )
        for rank in range(2)
    ]


@pytest.fixture(scope="module")
def four_steps(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run of two ranks."""
    run = tmp_path_factory.mktemp("four") / "run"
    assert [rank.wait() for rank in start_two(tiny, run, "")] == [0, 0]
    return run


@pytest.mark.parametrize(
    "kill",
    [kill if kill in ALWAYS else pytest.param(kill, marks=pytest.mark.full) for kill in KILLS],
    ids=str,
)
def test_a_kill_of_one_of_two_ranks_leaves_a_whole_checkpoint(
    kill: tuple[str, int, int], tiny: Tiny, four_steps: Path, tmp_path: Path
) -> None:
    site, rank, number = kill
    run = tmp_path / "run"
    ranks = start_two(tiny, run, f"kill@{site}:{number}:{rank}")
    codes = [started.wait() for started in ranks]
    assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == PEER_LOST, ranks[1 - rank].stderr
    left = complete_checkpoints(run / "checkpoints")
    newest = "step_2" if site in PUBLISHED else "step_1"
    assert newest in [path.name for path in left] and not any(map(damage, left))

    assert [started.wait() for started in start_two(tiny, run, "")] == [0, 0]
    assert curve(run) == curve(four_steps)
    assert [path.name for path in (run / "checkpoints").glob("step_*")] == ["step_4"]
    assert not list((run / "checkpoints").glob(".*")), "what the killed one left is removed"
