"""Saving and loading a running engine: everything under a temporary name, checked, then published
with one rename.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pretrain.checkpoint import layout
from pretrain.checkpoint.model_card import model_card
from pretrain.checkpoint.tokenizer_files import SideFiles, write_side_files
from pretrain.checkpoint.weights import read_experts_part, write_weights
from pretrain.config.load import recipe_to_yaml
from pretrain.core.errors import CheckpointError, StorageError, is_peer_loss
from pretrain.core.files import file_sha256, fsync_path
from pretrain.engine.engine import Engine

logger = logging.getLogger(__name__)


def random_state() -> dict[str, Any]:
    """The state of every random generator of this process, in types that a restricted loader
    accepts.
    """
    name, keys, position, has_gauss, cached = numpy.random.get_state(legacy=True)
    assert isinstance(keys, numpy.ndarray)
    state = {
        "python": random.getstate(),
        "numpy": (
            str(name),
            torch.from_numpy(keys.astype(numpy.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ),
        "torch": torch.get_rng_state(),
    }
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def restore_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    name, keys, position, has_gauss, cached = state["numpy"]
    numpy.random.set_state((name, keys.numpy().astype(numpy.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: ``runs/<name>/checkpoints``, on storage that all ranks share.
        tokenizer: copied into each checkpoint, so that it can be used alone.

    Attributes:
        side_files: what belongs to the tokenizer and travels with it; written into each checkpoint.
    """

    def __init__(
        self, folder: Path, engine: Engine, ds_config: dict[str, Any], tokenizer: Path
    ) -> None:
        self.folder = folder
        self.engine = engine
        self.ds_config = ds_config
        self.tokenizer = tokenizer
        self.side_files: SideFiles = {}

    def save(
        self,
        step: int,
        state: dict[str, Any],
        named: dict[str, int] | None = None,
        own: dict[str, Any] | None = None,
    ) -> Path:
        """Publishes ``step_<step>`` and moves ``latest`` to it, then removes old ones.

        Every rank must call it.

        Args:
            state: written to ``state.json``.
            named: steps by the pointer that names them; they are kept beside the newest
                ``checkpoint.keep_last``.
            own: this rank's own state, of plain types and tensors.

        Raises:
            StorageError: where space does not suffice or writing fails; older checkpoints are
                untouched.
        """
        engine, topology = self.engine, self.engine.topology
        target = layout.step_folder(self.folder, step)
        temporary = target.with_name(f".{target.name}.tmp")
        self._prepare(temporary)
        try:
            (temporary / layout.RANDOM_FOLDER).mkdir(exist_ok=True)
            torch.save(
                random_state() | {"own": own or {}},
                temporary / layout.RANDOM_FOLDER / f"rank_{topology.rank:05d}.pt",
            )
            tables = (
                {name: table.weight for name, table in engine.sparse_optimizer.tables.items()}
                if engine.sparse_optimizer is not None
                else {}
            )
            write_weights(
                temporary,
                engine.model,
                engine.masters.whole,
                topology.rank,
                engine.expert_parts,
                engine.recipe.model.total_experts,
                tables,
            )
            self._write_rows(temporary)
            engine.deepspeed.save_checkpoint(
                str(temporary), tag=layout.DEEPSPEED_TAG, save_latest=False
            )
            if topology.is_main:
                for script in temporary.glob(
                    "zero_to_*.py"
                ):  # DeepSpeed's converters: they mistake expert files for model files
                    script.unlink()
                (temporary / layout.RECIPE).write_text(
                    recipe_to_yaml(engine.recipe), encoding="utf-8"
                )
                (temporary / layout.DS_CONFIG).write_text(
                    json.dumps(self.ds_config, indent=2), encoding="utf-8"
                )
                (temporary / layout.STATE).write_text(json.dumps(state, indent=2), encoding="utf-8")
                shutil.copyfile(self.tokenizer, temporary / layout.TOKENIZER)
                write_side_files(self.side_files, temporary)
                (temporary / layout.CARD).write_text(
                    model_card(engine.recipe, state), encoding="utf-8"
                )
        except (OSError, RuntimeError, SafetensorError) as error:
            # torch's writer reports a full disk as a RuntimeError, safetensors' as its own. The
            # other ranks notice when this one is gone.
            if is_peer_loss(error):
                raise
            shutil.rmtree(temporary, ignore_errors=True)
            reason = (
                error.strerror if isinstance(error, OSError) else " ".join(str(error).split())[:200]
            )
            raise StorageError(
                f"cannot write the checkpoint of step {step} to {self.folder}: {reason}; free space"
                " and run the same command"
            ) from error
        topology.barrier()
        self._publish(temporary, target)
        if topology.is_main:
            self._point(named or {})
            self._remove_old(step, set((named or {}).values()))
        topology.barrier()
        return target

    def go_back(self, step: int, trunk: Path | None = None) -> Path | None:
        """Removes the checkpoints of step ``step`` and later ones, and returns the newest whole one
        before.

        None, and nothing is removed, where there is none. Every rank must call it.

        Args:
            trunk: a checkpoint of another run, to go back to where this run has none; if it is of a
                step before ``step``.
        """
        kept, topology = self.newest(before=step), self.engine.topology
        if kept is None and trunk is not None and layout.read_state(trunk)["step"] < step:
            kept = trunk
        if kept is not None and topology.is_main:
            if kept.parent == self.folder:
                layout.write_pointer(self.folder, kept.name)
            for folder in layout.complete_checkpoints(self.folder):
                if layout.step_of(folder) >= step:
                    logger.warning("removed %s: the run goes back to %s", folder, kept)
                    self._set_aside(folder)
            for name, target in layout.pointers(self.folder).items():
                if not (self.folder / target).is_dir():
                    (self.folder / name).unlink()
            self._clear()
        topology.barrier()
        return kept

    def newest(self, before: int | None = None) -> Path | None:
        """The newest checkpoint that is whole, of a step below ``before``; damaged ones are
        reported and passed over.

        The same answer on every rank.
        """
        topology = self.engine.topology
        damaged: list[str] = []
        for folder in layout.complete_checkpoints(self.folder):
            if before is not None and layout.step_of(folder) >= before:
                continue
            faults = [
                fault
                for fault in topology.all_gather(
                    layout.damage(folder, topology.rank, topology.world_size)
                )
                if fault
            ]
            if not faults:
                if damaged and topology.is_main:
                    logger.warning("fell back to %s, because %s", folder, "; ".join(damaged))
                    layout.write_pointer(self.folder, folder.name)
                return folder
            damaged.append(f"in {folder} {faults[0]}")
        if damaged:
            raise CheckpointError(
                f"no checkpoint of this run is whole: {'; '.join(damaged)}; start over with --fresh"
            )
        return None

    def whole(self, path: str) -> Path:
        """The checkpoint at ``path``, which may be another run's. Every rank must call it.

        Raises:
            CheckpointError: where there is none, or it is damaged.
        """
        topology = self.engine.topology
        folder = layout.resolve_checkpoint(path)
        if faults := [
            fault
            for fault in topology.all_gather(
                layout.damage(folder, topology.rank, topology.world_size)
            )
            if fault
        ]:
            raise CheckpointError(f"{folder} is damaged: {faults[0]}; choose another checkpoint")
        return folder

    def load(self, folder: Path) -> dict[str, Any]:
        """Restores weights, optimizer and random state from ``folder``. Every rank must call it.

        Returns:
            its ``state.json``, with what :meth:`save` got as this rank's ``own``.
        """
        optimizer = self.engine.optimizer
        own = [
            {name: value for name, value in group.items() if name != "params"}
            for group in optimizer.param_groups
        ]
        loaded, _ = self.engine.deepspeed.load_checkpoint(
            str(folder), tag=layout.DEEPSPEED_TAG, load_lr_scheduler_states=False
        )
        if loaded is None:
            raise CheckpointError(
                f"DeepSpeed found nothing to load in {folder}: the checkpoint is damaged, choose"
                " another or start over with --fresh"
            )
        # With the moments come the checkpoint's weight decay, betas and clipping: those of the
        # recipe hold.
        for group, options in zip(optimizer.param_groups, own, strict=True):
            group.update(options)
        if hasattr(optimizer, "clip_grad"):
            optimizer.clip_grad = self.engine.recipe.train.grad_clip
        self._load_rows(folder)
        path = folder / layout.RANDOM_FOLDER / f"rank_{self.engine.topology.rank:05d}.pt"
        of_rank = torch.load(path, weights_only=True)
        restore_random_state(of_rank)
        return layout.read_state(folder) | {"own": of_rank.get("own", {})}

    def _write_rows(self, folder: Path) -> None:
        """The optimizer state of tables, as far as rows were used: DeepSpeed knows nothing of it."""
        rows = self.engine.sparse_optimizer
        if rows is None:
            return
        (folder / layout.ROWS_FOLDER).mkdir(exist_ok=True)
        state = {
            f"{name}/{key}": value.cpu()
            for name, row_state in rows.states.items()
            for key, value in row_state.state().items()
        }
        save_file(
            state, folder / layout.ROWS_FOLDER / f"rank_{self.engine.topology.rank:05d}.safetensors"
        )

    def _load_rows(self, folder: Path) -> None:
        rows, engine = self.engine.sparse_optimizer, self.engine
        if rows is None:
            return
        weights = read_experts_part(folder, engine.expert_part, engine.expert_parts)
        state = load_file(
            folder / layout.ROWS_FOLDER / f"rank_{engine.topology.rank:05d}.safetensors"
        )
        for name, table in rows.tables.items():
            table.weight.copy_(weights[name])
            rows.states[name].load(
                {
                    key.removeprefix(f"{name}/"): value
                    for key, value in state.items()
                    if key.startswith(f"{name}/")
                }
            )

    def _prepare(self, temporary: Path) -> None:
        """Makes an empty temporary folder after checking that the disk has room."""
        topology = self.engine.topology
        problem = ""
        if topology.is_main:
            try:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
                problem = self._shortage()
            except OSError as error:
                problem = f"cannot make {temporary}: {error.strerror}"
        problem = topology.all_gather(problem)[0]
        if problem:
            if topology.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise StorageError(
                f"{problem}; free space or set another run_path, then run the same command"
            )

    def _shortage(self) -> str:
        existing = layout.complete_checkpoints(self.folder)
        if not existing:
            return ""
        needed = int(1.1 * sum(path.stat().st_size for path in layout.payload_files(existing[0])))
        free = shutil.disk_usage(self.folder).free
        return (
            f"disk full: a checkpoint needs {needed / 1e6:.0f} MB, {self.folder} has"
            f" {free / 1e6:.0f} MB"
            if free < needed
            else ""
        )

    def _publish(self, temporary: Path, target: Path) -> None:
        """Hashes and syncs all files (shared among the ranks), writes the manifest, renames, moves
        the pointer.
        """
        topology = self.engine.topology
        entries: dict[str, Any] = {}
        for path in layout.payload_files(temporary)[topology.rank :: topology.world_size]:
            fsync_path(path)
            entries[path.relative_to(temporary).as_posix()] = {
                "bytes": path.stat().st_size,
                "sha256": file_sha256(path),
            }
        shares = topology.all_gather(entries)
        if not topology.is_main:
            return
        manifest = {
            "version": 1,
            "files": {name: entry for share in shares for name, entry in sorted(share.items())},
        }
        (temporary / layout.MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        for path in (
            temporary / layout.MANIFEST,
            *(child for child in temporary.iterdir() if child.is_dir()),
            temporary,
        ):
            fsync_path(path)
        if target.exists():
            self._set_aside(target)
        os.replace(temporary, target)
        layout.write_pointer(self.folder, target.name)

    def _point(self, named: dict[str, int]) -> None:
        """Writes the pointers of checkpoints that are there; a pointer that no longer names one
        goes.
        """
        there = {
            name: layout.step_folder(self.folder, step).name
            for name, step in named.items()
            if layout.step_folder(self.folder, step).is_dir()
        }
        for name, target in layout.pointers(self.folder).items():
            if name != layout.LATEST and name not in there:
                (self.folder / name).unlink()
            elif there.get(name) == target:
                del there[name]
        for name, target in there.items():
            layout.write_pointer(self.folder, target, name)

    def _remove_old(self, step: int, protected: set[int]) -> None:
        """After a save at ``step``.

        Whatever is of a later step was damaged when the run began: it goes too, and counts for
        nothing.
        """
        folders = layout.complete_checkpoints(self.folder)
        later = [folder for folder in folders if layout.step_of(folder) > step]
        for folder in later:
            logger.warning(
                "removed %s: the run began before it, and has saved step %d", folder, step
            )
        old = folders[len(later) + self.engine.recipe.checkpoint.keep_last :]
        for folder in (
            *later,
            *(folder for folder in old if layout.step_of(folder) not in protected),
        ):
            self._set_aside(folder)
        self._clear()

    def _set_aside(self, folder: Path) -> None:
        """Gives a checkpoint that goes a temporary name: a kill while it is removed leaves no torn
        folder under a final one.
        """
        aside = folder.with_name(f".{folder.name}.removed.tmp")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(folder, aside)

    def _clear(self) -> None:
        """Removes what has a temporary name, from before too."""
        for torn in self.folder.glob(".step_*.tmp"):
            shutil.rmtree(torn, ignore_errors=True)
