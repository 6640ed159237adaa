"""Files and folders have the permissions that the umask gives, so that a group that may read a
run's folder may read all of it: weights like their neighbours.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.preprocess.coordinator import build
from data_pipeline.preprocess.workspace import Output
from pretrain.config.load import load_recipe
from pretrain.core.errors import DONE
from pretrain.train import main
from tests.support.tiny_run import Tiny, own_process
from tests.support.tool_runs import run_here


@pytest.fixture(params=[0o022, 0o027, 0o077, 0o002], ids=oct)
def mask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def wrong_modes(folder: Path, mask: int) -> dict[str, str]:
    """Everything below a folder that has not the permissions of a new file or folder."""
    found = {}
    for path in (folder, *folder.rglob("*")):
        wanted = (0o777 if path.is_dir() else 0o666) & ~mask
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode != wanted:
            found[str(path.relative_to(folder))] = f"{mode:o} instead of {wanted:o}"
    return found


def test_data_runs_checkpoints_and_exports_follow_the_umask(
    tiny: Tiny, mask: int, tmp_path: Path
) -> None:
    data, run, export = tmp_path / "data", tmp_path / "run", tmp_path / "export"
    build(load_recipe(str(tiny.recipe)).data, Output(data))
    with own_process():
        settings = (
            f"data.path={data}",
            "data.packing={kind: best_fit}",
            "logging.tensorboard=true",
            "logging.usage_interval_steps=2",
            "checkpoint.keep_best=true",
        )
        assert main(tiny.arguments(run, *settings)) == DONE
    checkpoint = run / "checkpoints" / "latest"
    for target, options in (("hf", ()), ("universal", ()), ("safetensors", ())):
        output = export / target
        done = run_here(
            "convert_checkpoint.py",
            *("--checkpoint", checkpoint, "--to", target, "--output", output, *options),
        )
        assert done.returncode == DONE, done.stderr
    names = {path.name for path in run.rglob("*.safetensors")}
    assert "weights-00000-of-00001.safetensors" in names
    assert (export / "hf" / "model.safetensors").is_file()
    for folder in (data, run, export):
        assert wrong_modes(folder, mask) == {}


def test_a_file_that_only_its_owner_reads_is_found(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"")
    (tmp_path / "weights").chmod(0o600)
    mask = os.umask(0o022)
    os.umask(mask)
    assert wrong_modes(tmp_path, mask)["weights"].startswith("600 instead of")
