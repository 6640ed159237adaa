"""Guards of many steps in real runs: they decide at one step, whether a run was resumed or not."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.core.errors import GuardError
from tests.integration.guards.test_guarded_runs import incidents, started
from tests.support.tiny_run import Tiny

pytestmark = pytest.mark.usefixtures("in_process")
GUARD = "guards.sustained_grad_norm={max: 1.0e-6, window_steps: 16, action: ACTION}"


@pytest.mark.parametrize("action", ["warn", "stop"])
def test_a_window_of_high_norms_is_reported_once_at_its_end_also_after_a_resume(
    action: str, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    guard = GUARD.replace("ACTION", action)
    saved = "checkpoint.interval_steps=5"
    assert started(tiny, tmp_path, guard, saved, steps=10).fit()
    assert not (tmp_path / "incidents.jsonl").exists()
    resumed = started(tiny, tmp_path, guard, saved, steps=20)
    assert resumed.progress.step == 10
    if action == "stop":
        with pytest.raises(GuardError, match=r"step 16: the median gradient norm of the last 16"):
            resumed.fit()
    else:
        assert resumed.fit()
    (entry,) = incidents(tmp_path)
    assert (entry["guard"], entry["action"], entry["step"]) == ("sustained_grad_norm", action, 16)
    assert "warning: step 16: the median gradient norm" in capsys.readouterr().err
