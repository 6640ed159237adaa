"""A checkpoint of somebody else leads nowhere else, and a damaged one is said to be damaged."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from pretrain.checkpoint import layout
from pretrain.checkpoint.saved_state import SavedProgress
from pretrain.core.errors import BAD_CHECKPOINT, CheckpointError, PipelineError
from pretrain.evaluation.checkpoint import whole_checkpoint
from pretrain.export.deepspeed_moe import tag_folder
from pretrain.export.writer import INDEX, weight_files
from pretrain.guards.progress import Progress
from tests.support.path_payloads import (
    FILES,
    MANIFESTS,
    NAMES,
    POINTERS,
    RECIPES,
    STATES,
    Change,
    named,
)
from tests.support.random_checkpoint import random_checkpoint, recipe_of, small_tokenizer
from tests.support.tool_runs import run_here


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "step_1"
    random_checkpoint(folder, recipe_of("debug"), small_tokenizer())
    assert layout.damage(folder) is None
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints" / "step_1"))


def refused(folder: Path) -> str:
    with pytest.raises(PipelineError) as error:
        checkpoint = whole_checkpoint(folder)
        layout.read_recipe(checkpoint)
    message = str(error.value)
    assert error.value.exit_code == BAD_CHECKPOINT
    assert str(folder) in message and "\n" not in message and len(message) < 1000
    return message


CHANGES: dict[str, Change] = {
    **{f"manifest: {name}": change for name, change in MANIFESTS.items()},
    **{f"files: {name}": change for name, change in FILES.items()},
    **{f"name: {name[:30]!a}": named(name) for name in NAMES},
    **{f"state: {name}": change for name, change in STATES.items()},
    **{f"recipe: {name}": change for name, change in RECIPES.items()},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_damaged_checkpoint_is_refused_in_a_sentence(
    change: str, copy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    CHANGES[change](copy)
    refused(copy)
    # Sizes alone are compared before weights are read; hashes and contents are not.
    if change.startswith(("files", "name")):
        assert layout.damage(copy, with_hashes=False) is not None
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "change", ["manifest: no files", "name: '../outside'", "state: step as text", "recipe: a list"]
)
def test_the_tool_ends_with_code_4_and_writes_nothing(
    change: str, copy: Path, tmp_path: Path
) -> None:
    CHANGES[change](copy)
    done = run_here(
        "convert_checkpoint.py",
        *("--checkpoint", copy, "--to", "safetensors", "--output", tmp_path / "out"),
    )
    assert done.returncode == BAD_CHECKPOINT
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", POINTERS)
def test_a_pointer_leads_to_a_checkpoint_next_to_it_or_nowhere(name: str, copy: Path) -> None:
    latest = copy.parent / layout.LATEST
    POINTERS[name](latest)
    with pytest.raises(CheckpointError) as refusal:
        layout.resolve_checkpoint(latest)
    assert str(copy.parent) in str(refusal.value) and "\n" not in str(refusal.value)
    found = layout.pointers(copy.parent)
    assert found in ({}, {"latest": "step_77"})


def test_a_pointer_is_not_written_through_a_link(copy: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("kept")
    latest = copy.parent / layout.LATEST
    for link in (latest, latest.with_name("latest.partial")):
        link.symlink_to(outside)
        layout.write_pointer(copy.parent, "step_1")
        assert outside.read_text() == "kept" and not latest.is_symlink()
        latest.unlink()
    latest.mkdir()
    with pytest.raises(CheckpointError, match="is a folder"):
        layout.write_pointer(copy.parent, "step_1")


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/model.safetensors",
        "a/model.safetensors",
        "..",
        "",
        "model.bin",
        "model.safetensors\0",
        "model.safetensors\n",
        ".safetensors",
        "x" * 300 + ".safetensors",
        "a\\..\\model.safetensors",
        5,
        None,
        ["model.safetensors"],
    ],
)
def test_an_index_names_safetensors_beside_it(name: object, tmp_path: Path) -> None:
    import json

    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(CheckpointError, match="index"):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    "tag", [b"..", b".", b"", b"../x", b"/etc", b"a/b", b"x" * 300, b"a\0", b"\xff", b"a\nb", b" "]
)
def test_a_tag_of_deepspeed_is_a_folder_beside_it(tag: bytes, tmp_path: Path) -> None:
    source = tmp_path / "run"
    source.mkdir()
    (source / "latest").write_bytes(tag)
    with pytest.raises(CheckpointError):
        tag_folder(source)


def test_a_tag_may_be_neither_a_pipe_nor_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    source = tmp_path / "run"
    source.mkdir()
    (source / "tag").symlink_to(tmp_path / "elsewhere")
    (source / "latest").write_text("tag")
    with pytest.raises(CheckpointError, match="names no folder beside it"):
        tag_folder(source)
    (source / "latest").unlink()
    os.mkfifo(source / "latest")
    with pytest.raises(CheckpointError, match="names no folder beside it"):
        tag_folder(source)


def test_every_field_of_the_progress_has_a_type_that_is_checked() -> None:
    assert set(SavedProgress.model_fields) == set(Progress.__dataclass_fields__)
    assert SavedProgress().model_dump() == Progress().__dict__
