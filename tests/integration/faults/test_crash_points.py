"""A save that is killed, or that finds the disk full, at any of its events."""

from __future__ import annotations

import pytest

from pretrain.core.faults import SITES
from tests.support.ranks import Results, run_cases
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
