"""environment.json: the state of the code, and variables without what is private."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from pretrain.callbacks.environment import (
    ENVIRONMENT,
    RunRecord,
    git_state,
    launch_variables,
    packages,
)
from pretrain.config.load import load_recipe


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "code.py").write_text("first\n")
    own = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (
        ["init", "-q", "-b", "trunk"],
        ["add", "code.py"],
        [*own, "commit", "-q", "-m", "first"],
    ):
        subprocess.run(["git", "-C", str(folder), *command], check=True)
    return folder


def test_a_clean_checkout_is_its_commit(checkout: Path) -> None:
    head = subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert git_state(checkout / "code.py") == {
        "commit": head,
        "branch": "trunk",
        "dirty": False,
        "diff_sha256": None,
        "untracked_files": 0,
    }


def test_each_change_has_a_hash_of_its_own(checkout: Path) -> None:
    hashes = set()
    for change in ("second\n", "third\n"):
        (checkout / "code.py").write_text(change)
        state = git_state(checkout / "code.py")
        assert state is not None and state["dirty"]
        assert git_state(checkout / "code.py") == state  # the same change has the same one
        hashes.add(state["diff_sha256"])
    (checkout / "new.py").write_text("new\n")
    state = git_state(checkout / "code.py")
    assert state is not None and state["untracked_files"] == 1
    assert len(hashes | {state["diff_sha256"]}) == 3


def test_what_git_does_not_track_has_at_most_the_commit_of_an_image(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("IMAGE_COMMIT", raising=False)
    (checkout / "installed.py").write_text("not of this project\n")
    assert git_state(checkout / "installed.py") is None
    assert git_state(tmp_path / "nowhere.py") is None
    monkeypatch.setenv("IMAGE_COMMIT", "c0ffee")
    assert git_state(tmp_path / "nowhere.py") == {"commit": "c0ffee"}
    monkeypatch.setenv("IMAGE_COMMIT", "")  # built without one
    assert git_state(tmp_path / "nowhere.py") is None


def test_variables_of_launchers_are_shown_and_private_ones_are_not() -> None:
    shown = {
        "RANK": "0",
        "NCCL_DEBUG": "INFO",
        "SLURM_JOB_ID": "7",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "0",
    }
    hidden = {
        "SLURM_JWT": "a",
        "NCCL_AUTH_COOKIE": "b",
        "WANDB_API_KEY": "c",
        "HF_TOKEN": "d",
        "HOME": "/home/me",
        "AWS_SECRET_ACCESS_KEY": "e",
        # They begin as known ones do.
        "TRITON_CREDS": "f",
        "LOCAL_PW": "g",
        "DS_API": "h",
        "NCCL_OF_MINE": "i",
        "CUDA_VISIBLE_DEVICES_PASSPHRASE": "j",
    }
    assert launch_variables(shown | hidden) == shown
    assert launch_variables({"NCCL_NET": "https://me:pa55word@host/"}) == {
        "NCCL_NET": "https://[redacted]@host/"
    }
    key = "hf_" + "a" * 34
    assert launch_variables({"TRITON_CACHE_DIR": f"/caches/{key}"}) == {
        "TRITON_CACHE_DIR": "/caches/[redacted]"
    }


def test_each_start_adds_an_entry_and_keeps_the_earlier_ones(tmp_path: Path) -> None:
    record = RunRecord(
        tmp_path, load_recipe("debug"), {"zero_optimization": {"stage": 1}}, world_size=2
    )
    record.on_start(0, 10)
    record.on_start(4, 10)
    starts = json.loads((tmp_path / ENVIRONMENT).read_text())["starts"]
    assert [start["after_step"] for start in starts] == [0, 4] and starts[0]["world_size"] == 2
    assert (
        starts[1]["packages"]["torch"] == packages()["torch"]
        and starts[1]["hardware"]["memory_bytes"] > 1 << 30
    )
    assert load_recipe(str(tmp_path / "recipe.yaml")) == load_recipe("debug")
    assert json.loads((tmp_path / "ds_config.json").read_text()) == {
        "zero_optimization": {"stage": 1}
    }
