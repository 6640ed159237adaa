"""Pictures of expert usage and references to checkpoints, in trackers without a network."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
from PIL import Image

from pretrain.analysis.expert_usage import UsageWindow
from pretrain.callbacks.expert_usage import HEAT_MAP, HISTOGRAM, usage_figures
from pretrain.callbacks.references import CheckpointWatch
from pretrain.callbacks.trackers.comet import CometTracker
from pretrain.callbacks.trackers.wandb import WandbTracker
from pretrain.callbacks.tracking import TrackedRun, Tracker, Tracking
from pretrain.checkpoint import layout
from pretrain.core.files import file_sha256
from tests.support.tracker_files import comet_messages, wandb_history, wandb_records

WEIGHTS = b"these bytes stay where they are" * 40


def window(step: int) -> UsageWindow:
    """Two layers of 64 experts; expert 7 of the first has ten times the mean."""
    counts_LE = np.full((2, 64), 10, dtype=np.int64)
    counts_LE[0, 7] = 110
    return UsageWindow(step=step, steps=2, layers=[1, 3], counts_LE=counts_LE)


def publish(checkpoints: Path, step: int, *names: str, content: bytes = WEIGHTS) -> Path:
    """A checkpoint as a run publishes it: a folder by one rename, and its pointers."""
    temporary = checkpoints / f".step_{step}.tmp"
    temporary.mkdir(parents=True)
    files = {}
    for name in (layout.RECIPE, layout.STATE, "weights-0.safetensors"):
        (temporary / name).write_bytes(content)
        files[name] = layout.file_entry(temporary / name)
    layout.write_manifest(temporary, files)
    target = layout.step_folder(checkpoints, step)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    for name in ("latest", *names):
        layout.write_pointer(checkpoints, target.name, name)
    return target


def track(tracker: Tracker, folder: Path) -> list[Path]:
    """A run with two windows and two checkpoints; returns the checkpoints."""
    checkpoints = folder / "checkpoints"
    run = TrackedRun(folder, project="p", name="n", group=None, tags=[], config={})
    callback = Tracking(tracker, run, [], checkpoints)
    callback.on_start(0, 4)
    callback.on_step(2)
    callback.on_usage(window(2))
    saved = [publish(checkpoints, 2, "best")]
    callback.on_step(3)
    # The last one is published after the last step.
    callback.on_step(4)
    callback.on_usage(window(4))
    saved.append(publish(checkpoints, 4))
    callback.on_end({"loss": 1.0})
    return saved


def test_a_window_is_one_histogram_of_all_experts_and_a_heat_map_whose_brightest_is_hot() -> None:
    figures = usage_figures(window(2), hot_factor=5.0)
    assert figures.counts.sum() == 2 * 64 and len(figures.edges) == len(figures.counts) + 1
    # Loads of the first layer: 63 experts below the mean, one far above it.
    assert figures.counts[-1] == 1 and figures.edges[-1] > 3
    assert figures.heat_map.dtype == np.uint8 and figures.heat_map.shape[2] == 3
    rows, columns = figures.heat_map.shape[0] // 4, figures.heat_map.shape[1] // 64
    cells = figures.heat_map[::rows, ::columns].astype(int).sum(axis=2)
    assert cells[1].argmax() == 7 and not cells[0].any() and cells[3].std() == 0


def test_wandb_gets_both_pictures_and_references_with_hashes_but_no_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    first, last = track(WandbTracker(), tmp_path)
    # W&B's own process writes the file, and may do so after the run has ended here.
    wandb.teardown()
    (log,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    records = list(wandb_records(log))
    rows = [row for row in wandb_history(records) if f"{HISTOGRAM}/values" in row]
    assert [row["step"] for row in rows] == [2, 4]
    expected = usage_figures(window(2), 5.0)
    assert rows[0][f"{HISTOGRAM}/_type"] == "histogram"
    assert rows[0][f"{HISTOGRAM}/values"] == expected.counts.tolist()
    assert rows[0][f"{HISTOGRAM}/bins"] == pytest.approx(expected.edges.tolist())
    picture = log.parent / "files" / rows[0][f"{HEAT_MAP}/path"]
    assert (np.asarray(Image.open(picture).convert("RGB")) == expected.heat_map).all()
    found = [one.artifact for one in records if one.WhichOneof("record_type") == "artifact"]
    models = [artifact for artifact in found if artifact.type == "model"]
    assert [set(artifact.aliases) for artifact in models] == [
        {"step_2", "best", "latest"},
        {"step_4", "latest"},
    ]
    for artifact, checkpoint in zip(models, (first, last), strict=True):
        facts = json.loads(artifact.metadata)
        assert facts["uri"] == checkpoint.as_uri() and facts["bytes"] == 3 * len(WEIGHTS)
        assert facts["manifest_sha256"] == file_sha256(checkpoint / layout.MANIFEST)
        entries = {entry.path: entry for entry in artifact.manifest.contents}
        weights = entries.pop("checkpoint/weights-0.safetensors")
        assert weights.ref == f"{checkpoint.as_uri()}/weights-0.safetensors"
        # Nothing but the manifest would be sent.
        assert [path for path, entry in entries.items() if not entry.ref] == [layout.MANIFEST]
    copies = [path for path in (tmp_path / "wandb").rglob("*") if path.is_file()]
    assert not any(WEIGHTS in path.read_bytes() for path in copies)


def test_comet_gets_both_pictures_and_references(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMET_START_ONLINE", "0")
    first, last = track(CometTracker(), tmp_path)
    (archive,) = tmp_path.rglob("*.zip")
    _, messages = comet_messages(archive)
    uploads = [one["payload"] for one in messages if one["type"] == "file_upload"]
    parameters = [one["additional_params"] for one in uploads]
    names = [one.get("figName") or one["fileName"] for one in parameters]
    assert sorted(names) == sorted(2 * [HISTOGRAM, HEAT_MAP])
    assert {one["step"] for one in parameters} == {2, 4}
    remote = [one["payload"] for one in messages if one["type"] == "remote_file"]
    assert [one["remote_uri"] for one in remote] == [first.as_uri(), last.as_uri()]
    for one, checkpoint in zip(remote, (first, last), strict=True):
        digest = file_sha256(checkpoint / layout.MANIFEST)
        assert one["metadata"]["manifest_sha256"] == digest


def steps(found: Sequence[Any]) -> list[tuple[int, tuple[str, ...]]]:
    return [(one.step, one.names) for one in found]


def test_a_checkpoint_is_seen_once_and_again_for_another_name_or_content(tmp_path: Path) -> None:
    watch = CheckpointWatch(tmp_path / "checkpoints")
    assert watch.new() == []
    publish(tmp_path / "checkpoints", 1)
    assert steps(watch.new()) == [(1, ("latest",))]
    assert watch.new() == []
    publish(tmp_path / "checkpoints", 2)
    # The first has lost a name, which is no news.
    assert steps(watch.new()) == [(2, ("latest",))]
    layout.write_pointer(tmp_path / "checkpoints", "step_1", "best")
    assert steps(watch.new()) == [(1, ("best",))]
    # After a rollback another checkpoint may have the same step.
    publish(tmp_path / "checkpoints", 2, content=b"another")
    assert steps(watch.new()) == [(2, ("latest",))]
