from __future__ import annotations

import math
import random
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import save_file

from pretrain.checkpoint.random_state import (
    derive_random_state,
    random_state,
    restore_random_state,
)
from pretrain.checkpoint.rank_file import read_rank_file, write_rank_file
from pretrain.core.errors import CheckpointError


def drawn() -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        float(numpy.random.random()),
        float(numpy.random.standard_normal()),
        *torch.randn(3).tolist(),
    ]


def test_every_generator_continues_where_it_was(tmp_path: Path) -> None:
    # An odd number of normal values: the generators keep the second one of a pair.
    drawn()
    write_rank_file(tmp_path / "a", {"random": random_state()})
    expected = drawn()
    drawn()
    restore_random_state(read_rank_file(tmp_path / "a")["random"])
    assert drawn() == expected


def test_derived_generators_differ_by_seed_step_and_rank_and_repeat() -> None:
    seen = []
    for seed, step, rank in ((1, 2, 3), (1, 2, 4), (1, 3, 3), (2, 2, 3), (1, 2, 3)):
        derive_random_state(seed, step, rank)
        seen.append(drawn())
    assert seen[0] == seen[-1]
    assert len({value for values in seen[:-1] for value in values}) == 4 * len(seen[0])


def test_plain_values_and_tensors_come_back(tmp_path: Path) -> None:
    content = {
        "numbers": [1, 2.5, -1e300, True, None, "text"],
        "nested": [{"tensor of": torch.arange(6).view(2, 3)}, [torch.tensor(0.1)]],
        "infinite": math.inf,
    }
    entry = write_rank_file(tmp_path / "a", content)
    assert entry["bytes"] == (tmp_path / "a").stat().st_size
    found = read_rank_file(tmp_path / "a")
    assert found["numbers"] == content["numbers"] and found["infinite"] == math.inf
    assert torch.equal(found["nested"][0]["tensor of"], torch.arange(6).view(2, 3))
    assert torch.equal(found["nested"][1][0], torch.tensor(0.1))


def test_files_of_something_else_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "foreign")
    save_file({"a": torch.ones(1)}, tmp_path / "torn", {"content": '{"tensor": "b"}'})
    save_file({"a": torch.ones(1)}, tmp_path / "deep", {"content": "[" * 100_000})
    (tmp_path / "pickle").write_bytes(b"\x80\x04cos\nsystem\n.")
    for name in ("foreign", "torn", "deep", "pickle", "missing"):
        with pytest.raises(CheckpointError, match=name):
            read_rank_file(tmp_path / name)
