"""Checkpoints: damaged ones are named and passed over, a save that fails leaves the older ones, and
the weights files are the masters.
"""

from __future__ import annotations

import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from deepspeed import zero as deepspeed_zero
from torch import nn

from data_pipeline.loading.packing import Windows
from data_pipeline.loading.validation import validation_batches
from data_pipeline.shards.manifest import load_manifest
from data_pipeline.shards.token_stream import open_split
from pretrain.checkpoint import layout
from pretrain.checkpoint.weights import load_model, load_state_dict
from pretrain.core.errors import CheckpointError
from pretrain.train import main
from tests.support.tiny_run import SCRIPT, Started, Tiny, curve, make_trainer

Command = Callable[[list[str]], tuple[int, str]]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove(path: Path) -> None:
    path.unlink()


DAMAGES: dict[Callable[[Path], None], str] = {
    truncate: "bytes instead of",
    flip_a_bit: "does not have the content that was saved",
    remove: "is missing",
}


@pytest.fixture
def run(six_steps: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(six_steps, tmp_path / "run"))


def test_any_damage_to_any_file_of_a_checkpoint_is_found_and_named(run: Path) -> None:
    checkpoint = run / "checkpoints" / "step_6"
    assert layout.damage(checkpoint) is None
    files = layout.payload_files(checkpoint)
    assert len(files) >= 8
    for path in files:
        content = path.read_bytes()
        for damage, sentence in DAMAGES.items():
            damage(path)
            fault = layout.damage(checkpoint)
            assert (
                fault is not None
                and path.relative_to(checkpoint).as_posix() in fault
                and sentence in fault
            )
            path.write_bytes(content)
    (checkpoint / layout.MANIFEST).write_text("{")
    assert layout.damage(checkpoint) == "manifest.json is no manifest: it is not valid JSON"


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_named_and_the_older_one_gives_the_same_end(
    damage: Callable[[Path], None], run: Path, six_steps: Path, tiny: Tiny, train: Command
) -> None:
    damaged = run / "checkpoints" / "step_6" / "weights-00000-of-00001.safetensors"
    damage(damaged)
    assert train(tiny.arguments(run, steps=6))[0] == 0
    warning = next(
        line for line in (run / "log.txt").read_text().splitlines() if "fell back to" in line
    )
    assert (
        "step_3" in warning
        and "step_6" in warning
        and damaged.name in warning
        and DAMAGES[damage] in warning
    )
    assert curve(run) == curve(six_steps)
    assert layout.damage(run / "checkpoints" / "step_6") is None


def test_when_all_checkpoints_are_damaged_the_run_stops_with_code_4_and_names_them(
    run: Path, tiny: Tiny, train: Command
) -> None:
    for step in (3, 6):
        flip_a_bit(run / "checkpoints" / f"step_{step}" / "state.json")
    code, message = train(tiny.arguments(run, steps=6))
    assert code == 4
    assert (
        "step_3" in message
        and "step_6" in message
        and "state.json" in message
        and "--fresh" in message
    )
    assert "Traceback" not in message


@pytest.mark.parametrize("text", [None, "", "../elsewhere\n"])
def test_a_wrong_latest_is_refused_by_readers_and_does_not_stop_a_resume(
    text: str | None, run: Path, tiny: Tiny, train: Command
) -> None:
    latest = run / "checkpoints" / "latest"
    latest.unlink()
    if text is not None:
        latest.write_text(text)
    with pytest.raises(CheckpointError) as refused:
        layout.resolve_checkpoint(latest)
    assert str(latest) in str(refused.value)
    code, _ = train(tiny.arguments(run, steps=7))
    assert code == 0
    assert latest.read_text() == "step_7\n"
    assert [row["step"] for row in curve(run) if row["kind"] == "train"] == [1, 2, 3, 4, 5, 6, 7]


def test_a_torn_temporary_folder_is_ignored_and_removed_at_the_next_save(
    run: Path, tiny: Tiny, train: Command
) -> None:
    torn = Path(
        shutil.copytree(run / "checkpoints" / "step_6", run / "checkpoints" / ".step_9.tmp")
    )
    (torn / layout.MANIFEST).unlink()
    assert train(tiny.arguments(run, steps=7))[0] == 0
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"latest", "step_6", "step_7"}


def test_checkpoints_saved_after_a_fallback_are_kept_and_the_damaged_one_goes(
    run: Path, tiny: Tiny, train: Command
) -> None:
    flip_a_bit(run / "checkpoints" / "step_6" / "weights-00000-of-00001.safetensors")
    for steps in (4, 5):
        assert train(tiny.arguments(run, "checkpoint.keep_last=1", steps=steps))[0] == 0
        assert {path.name for path in (run / "checkpoints").iterdir()} == {
            "latest",
            f"step_{steps}",
        }
        assert layout.resolve_checkpoint(run / "checkpoints" / "latest").name == f"step_{steps}"
    steps_begun = [
        line.rpartition("/")[2]
        for line in (run / "log.txt").read_text().splitlines()
        if "resumed from" in line
    ]
    assert steps_begun == ["step_3", "step_4"]


class Killed(BaseException):
    """Where a process would end."""


def test_a_kill_while_a_checkpoint_is_removed_leaves_nothing_that_looks_whole(
    run: Path, tiny: Tiny, train: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove_tree = shutil.rmtree

    def killed(path: Path, **options: bool) -> None:
        if (
            "step_3" in path.name and path.is_dir()
        ):  # as far as a removal gets: the folder is still there, its manifest is not
            (path / layout.MANIFEST).unlink()
            raise Killed
        remove_tree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(Killed):
        main(tiny.arguments(run, steps=7))
    monkeypatch.undo()
    assert not (run / "checkpoints" / "step_3").exists()
    assert layout.resolve_checkpoint(run / "checkpoints" / "latest").name == "step_7"
    assert train(tiny.arguments(run, steps=8))[0] == 0
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"latest", "step_7", "step_8"}


# Everything is written, synced and listed in the manifest; only the rename is missing.
KILLED_BEFORE_THE_RENAME = """\
import os, signal, sys
from pretrain.checkpoint import publication
from pretrain.train import main
rename = os.replace
def killed(source, target):
    if str(target).endswith("step_7"):
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
publication.os.replace = killed
main(sys.argv[1:])
"""


def test_a_kill_in_the_middle_of_a_save_leaves_the_older_checkpoint(
    run: Path, tiny: Tiny, train: Command
) -> None:
    (run.parent / "killed.py").write_text(KILLED_BEFORE_THE_RENAME)
    command: list[str | Path] = [sys.executable, run.parent / "killed.py"]
    started = Started([*command, *tiny.arguments(run, steps=7)], run.parent)
    assert started.wait() == -signal.SIGKILL, started.stderr
    checkpoints = run / "checkpoints"
    assert (checkpoints / ".step_7.tmp" / layout.MANIFEST).is_file()
    assert (checkpoints / "latest").read_text() == "step_6\n"
    assert layout.damage(checkpoints / "step_6") is None
    assert train(tiny.arguments(run, steps=7))[0] == 0
    assert {path.name for path in checkpoints.iterdir()} == {"latest", "step_6", "step_7"}


def test_a_full_disk_during_a_save_ends_with_code_5_and_leaves_the_older_checkpoints(
    run: Path, tiny: Tiny
) -> None:
    (run / "log.txt").unlink()

    def limit_file_size() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    started = Started(
        [sys.executable, SCRIPT, *tiny.arguments(run, steps=7)], run.parent, preexec=limit_file_size
    )
    code = started.wait()
    assert code == 5, started.stderr
    assert (
        "cannot write the checkpoint of step 7" in started.stderr and "free space" in started.stderr
    )
    assert "Traceback" not in started.stderr
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"latest", "step_3", "step_6"}
    assert layout.damage(run / "checkpoints" / "step_6") is None


def test_the_newest_and_the_best_checkpoints_are_kept(
    tiny: Tiny, tmp_path: Path, train: Command
) -> None:
    run = tmp_path / "run"
    settings = [
        "checkpoint.interval_steps=1",
        "checkpoint.keep_best=true",
        "validation.interval_steps=1",
        "validation.max_windows=null",
    ]
    assert train(tiny.arguments(run, *settings, steps=3))[0] == 0
    # Steps of size 10 destroy the weights, whatever the machine's rounding: the best checkpoint is
    # one of the first three.
    assert train(tiny.arguments(run, *settings, "optimizer.learning_rate=10", steps=6))[0] == 0
    validations = {
        row["step"]: row["validation_loss"] for row in curve(run) if row["kind"] == "validation"
    }
    best = min(validations, key=lambda step: validations[step])
    assert best <= 3
    assert {path.name for path in layout.complete_checkpoints(run / "checkpoints")} == {
        "step_5",
        "step_6",
        f"step_{best}",
    }


def live_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """What the model computes with, the partitioned weights of ZeRO 3 gathered."""
    with deepspeed_zero.GatheredParameters(list(model.parameters())):
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def validation_loss(tiny: Tiny, checkpoint: Path, dtype: torch.dtype) -> float:
    """Nats per token of a checkpoint's weights files in the plain model, over the whole validation
    split.
    """
    model, recipe = load_model(checkpoint, dtype=dtype)
    manifest = load_manifest(tiny.data)
    windows = Windows(
        open_split(manifest, "validation"), recipe.train.sequence_length, manifest.tokenizer.eod_id
    )
    nll, targets = 0.0, 0
    with torch.no_grad():
        for batch in validation_batches(windows, 2, 0, 1, None):
            nll += model(batch.input_ids_BS, batch.labels_BS, 1.0).nll.item()
            targets += int((batch.labels_BS >= 0).sum())
    return nll / targets


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_weights_files_hold_the_fp32_masters_and_give_the_same_validation_loss(
    zero: int, precision: str, tiny: Tiny, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    trainer = make_trainer(
        tiny, run, f"train.precision={precision}", "validation.interval_steps=9", zero=zero, steps=2
    )
    run.mkdir()
    assert trainer.fit()
    checkpoint = run / "checkpoints" / "step_2"
    saved, live = load_state_dict(checkpoint), live_weights(trainer.engine.model)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    assert saved.keys() == live.keys()
    for name, weight in saved.items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight.to(dtype), live[name]), name
    rounded = [
        name for name, weight in saved.items() if torch.equal(weight, weight.bfloat16().float())
    ]
    assert rounded == [], "these were saved after rounding to bf16, not from the masters"
    last = trainer.progress.last_validation
    assert validation_loss(tiny, checkpoint, dtype) == pytest.approx(
        last, rel=1e-6 if precision == "fp32" else 1e-4
    )


def test_weights_of_another_step_give_another_validation_loss(six_steps: Path, tiny: Tiny) -> None:
    last = next(row for row in reversed(curve(six_steps)) if row["kind"] == "validation")[
        "validation_loss"
    ]
    assert validation_loss(
        tiny, six_steps / "checkpoints" / "step_6", torch.float32
    ) == pytest.approx(last, rel=1e-6)
    assert validation_loss(
        tiny, six_steps / "checkpoints" / "step_3", torch.float32
    ) != pytest.approx(last, rel=1e-3)
