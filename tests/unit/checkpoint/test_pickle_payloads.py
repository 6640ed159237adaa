"""Files of weights that somebody else made run no code, and take neither memory nor time without
end, on every path that reads them.
"""

from __future__ import annotations

import contextlib
import os
import resource
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pretrain.checkpoint.foreign_state_dict import FILES, FileWeights, model_of_config
from pretrain.core.errors import CheckpointError
from pretrain.export.deepspeed_moe import import_deepspeed
from tests.support.paths import ROOT
from tests.support.pickle_payloads import DAMAGED, ENDLESS, running_payloads
from tests.support.tiny_model import KINDS, tiny_config

RUNNING = running_payloads()
CONFIG = tiny_config(KINDS["dropless"])
MOST_SECONDS = 60.0
MOST_MEMORY_KB = 1_500_000


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """The block may take neither much memory nor much time."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    yield
    assert time.monotonic() - start < MOST_SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_MEMORY_KB


def refused_as_weights(path: Path) -> str:
    """What a recipe's ``initial_weights`` says of a file."""
    with pytest.raises(CheckpointError) as refused:
        stored = FileWeights(path, CONFIG)
        model_of_config(stored.config, CONFIG)
    return str(refused.value)


def refused_as_checkpoint(folder: Path, output: Path) -> str:
    """What ``convert_checkpoint.py --from deepspeed`` says of a folder."""
    with pytest.raises(CheckpointError) as refused:
        import_deepspeed(folder, output, torch.float32, overwrite=False)
    assert not output.exists()
    return str(refused.value)


def main_file(folder: Path) -> Path:
    folder.mkdir()
    return folder / "mp_rank_00_model_states.pt"


@pytest.mark.parametrize("name", RUNNING)
def test_no_file_runs_code(name: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    path = tmp_path / f"weights{FILES[list(RUNNING).index(name) % 4]}"
    main = main_file(tmp_path / "tag")
    for place in (path, main):
        RUNNING[name](place, canary)
    messages = [refused_as_weights(path), refused_as_checkpoint(main.parent, tmp_path / "out")]
    torch.save({"module": {"w": torch.ones(1)}, "num_experts": [1]}, main)
    expert = main.with_name("layer_0_expert_0_mp_rank_00_model_states.pt")
    RUNNING[name](expert, canary)
    messages.append(refused_as_checkpoint(main.parent, tmp_path / "out"))
    assert not canary.exists()
    for message, place in zip(messages, (path, main, expert), strict=True):
        assert str(place) in message and "\n" not in message and "weights_only" not in message


@pytest.mark.parametrize("name", RUNNING)
def test_the_canary_is_written_by_an_unpickler_without_restriction(
    name: str, tmp_path: Path
) -> None:
    canary = tmp_path / "canary"
    RUNNING[name](tmp_path / "file", canary)
    with contextlib.suppress(Exception), warnings.catch_warnings(action="ignore"):
        if name.endswith("plain pickle"):
            import pickle

            pickle.loads((tmp_path / "file").read_bytes())
        else:
            torch.load(tmp_path / "file", weights_only=False)
    assert os.path.lexists(canary)


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_or_endless_file_is_a_sentence(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A file that passes the real limit takes seconds to make.
    monkeypatch.setattr("pretrain.checkpoint.pickled.MOST_INSTRUCTIONS", ENDLESS)
    path = tmp_path / "weights.pt"
    main = main_file(tmp_path / "tag")
    for place in (path, main):
        DAMAGED[name](place)
    # The endless ones were made in this process.
    with bounded():
        if name != "a folder":  # which is a checkpoint's, not a file of weights
            assert "\n" not in refused_as_weights(path)
        assert "\n" not in refused_as_checkpoint(main.parent, tmp_path / "out")


@pytest.mark.parametrize(
    "content",
    [["3"], [True], [-1], [1 << 60], [1.5], [None], [[1]], [1] * 110_000, [100_000] * 9_000],
    ids=lambda content: str(content)[:12],
)
def test_numbers_of_experts_that_are_none_are_refused(
    content: list[object], tmp_path: Path
) -> None:
    main = main_file(tmp_path / "tag")
    torch.save({"module": {"w": torch.ones(1)}, "num_experts": content}, main)
    with bounded():
        refused_as_checkpoint(main.parent, tmp_path / "out")


@pytest.mark.parametrize(
    "name", ["layer_0_expert_999999999999", "layer_99999999999_expert_0", "expert_100001"]
)
def test_files_of_experts_without_number_are_refused(name: str, tmp_path: Path) -> None:
    main = main_file(tmp_path / "tag")
    for place in (main, main.with_name(f"{name}_mp_rank_00_model_states.pt")):
        torch.save({"module": {"w": torch.ones(1)}}, place)
    with bounded():
        assert name in refused_as_checkpoint(main.parent, tmp_path / "out")


def test_what_other_loops_save_is_read(tmp_path: Path) -> None:
    """Bytes, sets and parameters are no attack."""
    content = {
        "model": {"w": torch.nn.Parameter(torch.ones(2)), "tied": torch.ones(2).expand(3, 2)},
        "note": b"bytes",
        "seen": {1, 2},
        "config": {"n_head": 2},
        "sizes": [torch.Size([1, 2])] * 3000,
    }
    for new in (True, False):
        torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=new)
        stored = FileWeights(tmp_path / "a.pt", CONFIG)
        assert stored.shapes == {"w": (2,), "tied": (3, 2)} and stored.config == {"n_head": 2}


# The converter that DeepSpeed ships reads files that this process has just checked.
UNRESTRICTED_ALLOWED = {"pretrain/checkpoint/universal.py"}


def test_nothing_else_unpickles_without_restriction() -> None:
    """Of what comes from a file."""
    signs = ("weights_only=False", "pickle.load(", "allow_pickle=True", "yaml.unsafe_load")
    found = {
        path.relative_to(ROOT).as_posix()
        for package in ("pretrain", "data_pipeline", "tools", "launchers")
        for path in (ROOT / package).rglob("*.py")
        if any(sign in path.read_text(encoding="utf-8") for sign in signs)
    }
    assert found <= UNRESTRICTED_ALLOWED
