"""A universal checkpoint resumes in an engine of another shape as the run itself would have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.random_checkpoint import small_tokenizer
from tests.support.ranks import run_cases
from tests.support.workers.universal import INCOMPLETE, ROUTES


@pytest.mark.full
def test_training_goes_on_from_universal_checkpoints_at_another_ep_size(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(small_tokenizer().content)
    case = {
        "name": "universal",
        "folder": str(tmp_path / "checkpoints"),
        "tokenizer": str(tmp_path / "tokenizer.json"),
    }
    routes = run_cases("universal", [case], 2, tmp_path / "ranks")["universal"]["routes"]
    assert [route["complete"] for route in routes] == [True] * len(ROUTES) + [False] * len(
        INCOMPLETE
    )
    for route in routes:
        expected, found = torch.tensor(route["expected"]), torch.tensor(route["found"])
        if route["complete"]:
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        else:
            # As DeepSpeed alone loads it, balancing biases are lost, and at ZeRO 3 the steps too.
            assert (found / expected - 1).abs().max() > 1e-4
