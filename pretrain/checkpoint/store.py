"""Saves and loads a running engine.

A checkpoint is written under a temporary name, checked, and published with one rename
(``publication.py``). A copy of the engine's state is written in the background, so that training
waits for the copy only.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.tokenizer.files import same_kind_of
from pretrain.checkpoint import layout
from pretrain.checkpoint.engine_state import (
    Snapshot,
    load_engine,
    weight_tensors,
    write_tensors,
)
from pretrain.checkpoint.ledger import Ledger
from pretrain.checkpoint.model_card import model_card
from pretrain.checkpoint.optimizer_state import Stored, optimizer_tensors
from pretrain.checkpoint.publication import CheckpointFolder, first_fault
from pretrain.checkpoint.random_state import (
    derive_random_state,
    random_state,
    restore_random_state,
)
from pretrain.checkpoint.rank_file import read_rank_file, write_rank_file
from pretrain.checkpoint.saving import SaveThread, SavingRanks
from pretrain.checkpoint.state import CheckpointState, RankState
from pretrain.checkpoint.tensor_files import TensorReader
from pretrain.checkpoint.tokenizer_files import SideFiles, write_side_files
from pretrain.checkpoint.validate import open_whole_weights
from pretrain.checkpoint.weights import OPTIMIZER, RANK, WEIGHTS, file_of, files_of
from pretrain.config.load import recipe_to_yaml
from pretrain.core import faults
from pretrain.core.errors import CheckpointError, StorageError
from pretrain.core.files import JsonObject, fsync_path
from pretrain.engine.engine import Engine

logger = logging.getLogger(__name__)

TENSORS = ".safetensors"


@dataclass(frozen=True)
class LoadedState:
    """What a checkpoint holds next to what was restored into the engine.

    Attributes:
        rank_states: what each rank saved; of this rank alone if there are as many ranks as then.
        ranks: how many have saved.
    """

    state: CheckpointState
    rank_states: list[RankState]
    ranks: int


@dataclass(frozen=True)
class Content:
    """All that a rank writes of a checkpoint.

    Attributes:
        rank_state: random state and what else is of this rank alone.
        pointers: steps by the pointer that names them.
    """

    step: int
    weights: list[Stored]
    optimizer: list[Stored]
    rank_state: JsonObject
    state: CheckpointState
    pointers: Mapping[str, int]

    @property
    def bytes(self) -> int:
        """Of the tensors."""
        return sum(stored.values.nbytes for stored in (*self.weights, *self.optimizer))


class CheckpointStore:
    """The checkpoints of one run. Every rank must make it, and call each method alike.

    Args:
        folder: ``runs/<name>/checkpoints``, on storage that all ranks share.
        tokenizer: copied into each checkpoint, so that it can be used alone.

    Attributes:
        side_files: what belongs to the tokenizer and is written into each checkpoint with it.
        thread: writes what was saved last.
        ledger: of the run, on rank 0; None if none is kept.
    """

    def __init__(
        self, folder: Path, engine: Engine, ds_config: JsonObject, tokenizer: Path
    ) -> None:
        self.folder = folder
        self.engine = engine
        self.ds_config = ds_config
        self.tokenizer = tokenizer
        self.side_files: SideFiles = {}
        self.thread = SaveThread()
        self.ledger: Ledger | None = None
        self._ranks = SavingRanks(engine.topology)
        self._checkpoints = CheckpointFolder(folder, self._ranks)
        self._snapshots = Snapshot(), Snapshot()

    def save(
        self,
        step: int,
        state: CheckpointState,
        pointers: Mapping[str, int] | None = None,
        rank_state: RankState | None = None,
        background: bool = False,
    ) -> Path:
        """Publish ``step_<step>``, move ``latest`` to it, and remove old checkpoints.

        It first waits until the checkpoint before is published.

        Args:
            state: written to ``state.json``.
            pointers: steps by the pointer that names them; these checkpoints are kept in addition
                to the newest ``checkpoint.keep_last``.
            rank_state: of this rank.
            background: return once the state is copied, and write it while training continues.

        Raises:
            StorageError: if space does not suffice or writing fails, this time or in the background
                the time before; older checkpoints are untouched.
        """
        self.thread.finish()
        faults.reached("save.begin")
        engine = self.engine
        weights, optimizer = list(weight_tensors(engine)), list(optimizer_tensors(engine))
        faults.reached("save.snapshot")
        if background:
            weights, optimizer = (
                snapshot.take(tensors)
                for snapshot, tensors in zip(self._snapshots, (weights, optimizer), strict=True)
            )
        content = Content(
            step=step,
            weights=weights,
            optimizer=optimizer,
            rank_state={"random": random_state(), "own": rank_state or {}},
            state={**state, "engine": engine.counts(), "saved_at": time.time()},
            pointers=pointers or {},
        )
        if background:
            self.thread.start(lambda: self._write(content))
        else:
            self._write(content)
        return layout.step_folder(self.folder, step)

    def finish(self) -> None:
        """Wait until what was saved is published.

        Raises:
            StorageError: as :meth:`save`.
        """
        self.thread.finish()

    def go_back(self, step: int, parent: Path | None = None) -> Path | None:
        """Remove the checkpoints from step ``step`` on, and return the newest whole one before.

        If there is none, nothing is removed and None is returned. Every rank must call it.

        Args:
            parent: a checkpoint of another run, to go back to if this run has none and it is of a
                step before ``step``.
        """
        self.thread.finish()
        kept = self.newest(before=step)
        if kept is None and parent is not None and layout.read_state(parent)["step"] < step:
            kept = parent
        topology = self.engine.topology
        if kept is not None and topology.is_main:
            self._checkpoints.remove_from(step, kept)
            if self.ledger is not None:
                self.ledger.rollback(kept)
        topology.barrier()
        return kept

    def newest(self, before: int | None = None) -> Path | None:
        """Return the newest whole checkpoint of a step below ``before``; None if there is none.

        Damaged ones are reported and passed over. The result is the same on every rank, and every
        rank must call it.

        Raises:
            CheckpointError: if there are checkpoints, and all of them are damaged.
        """
        damaged: list[str] = []
        for folder in layout.complete_checkpoints(self.folder):
            if before is not None and layout.step_of(folder) >= before:
                continue
            fault = first_fault(folder, self.engine.topology)
            if fault is None:
                if damaged and self.engine.topology.is_main:
                    logger.warning("fell back to %s, because %s", folder, "; ".join(damaged))
                    layout.write_pointer(self.folder, folder.name)
                return folder
            damaged.append(f"in {folder} {fault}")
        if damaged:
            raise CheckpointError(
                f"no checkpoint of this run is whole: {'; '.join(damaged)}; start over with --fresh"
            )
        return None

    def whole(self, path: str) -> Path:
        """Return the checkpoint at ``path``, which may be another run's.

        Every rank must call it.

        Raises:
            CheckpointError: if there is none, or it is damaged.
        """
        folder = layout.resolve_checkpoint(path)
        if fault := first_fault(folder, self.engine.topology):
            raise CheckpointError(f"{folder} is damaged: {fault}; choose another checkpoint")
        return folder

    def _write(self, content: Content) -> None:
        """Write and publish a checkpoint; the same end on every rank."""
        target = layout.step_folder(self.folder, content.step)
        temporary = self._checkpoints.prepare(target, content.bytes)
        files: dict[str, layout.FileEntry] = {}
        error: Exception | None = None
        try:
            files = self._write_files(temporary, content)
        except Exception as caught:
            error = caught
        # Also the barrier behind which all files are there.
        found = self._ranks.all_gather((files, None if error is None else _reason(error)))
        reason = next((reason for _, reason in found if reason is not None), None)
        if reason is None:
            reason, error = self._publish(
                temporary,
                content,
                {name: entry for files, _ in found for name, entry in files.items()},
            )
        if reason is None:
            return
        if self._ranks.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        if error is not None and not isinstance(error, OSError):
            raise error
        raise StorageError(
            f"cannot write the checkpoint of step {content.step} to {self.folder}: {reason}; "
            "free space and run the same command"
        ) from error

    def _write_files(self, folder: Path, content: Content) -> dict[str, layout.FileEntry]:
        """Write and sync this rank's files, and return what the manifest says of them."""
        weights, optimizer, own = (
            file_of(kind, self._ranks.rank, self._ranks.world_size)
            for kind in (WEIGHTS, OPTIMIZER, RANK)
        )
        faults.reached("save.write_weights")
        files = {weights: write_tensors(folder / weights, content.weights)}
        faults.reached("save.write_optimizer")
        files[optimizer] = write_tensors(folder / optimizer, content.optimizer)
        faults.reached("save.write_rank")
        files[own] = write_rank_file(folder / own, content.rank_state)
        if not self._ranks.is_main:
            return files
        faults.reached("save.write_shared")
        recipe = self.engine.recipe
        texts = {
            layout.RECIPE: recipe_to_yaml(recipe),
            layout.DS_CONFIG: json.dumps(self.ds_config, indent=2),
            layout.STATE: json.dumps(content.state, indent=2),
            layout.CARD: model_card(recipe, content.state),
        }
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        shutil.copyfile(self.tokenizer, folder / same_kind_of(self.tokenizer))
        write_side_files(self.side_files, folder)
        tensor_files = {path for path in folder.iterdir() if path.suffix == TENSORS}
        for path in sorted(set(layout.payload_files(folder)) - tensor_files):
            faults.reached("save.sync")
            fsync_path(path)
            files[path.relative_to(folder).as_posix()] = layout.file_entry(path)
        return files

    def _publish(
        self, temporary: Path, content: Content, files: Mapping[str, layout.FileEntry]
    ) -> tuple[str | None, Exception | None]:
        """Let rank 0 publish; return what went wrong, on every rank, and the error on rank 0."""
        error: Exception | None = None
        if self._ranks.is_main:
            target = layout.step_folder(self.folder, content.step)
            try:
                # Only headers are read: every element of every weight must be there, once.
                open_whole_weights(temporary, self.engine.recipe.model)
                self._checkpoints.publish(temporary, target, files, self.ledger)
                self._checkpoints.point(content.pointers)
                config = self.engine.recipe.checkpoint
                protected = {*content.pointers.values()}
                if config.keep_every_hours is not None:
                    protected |= self._checkpoints.first_of_each(config.keep_every_hours)
                faults.reached("save.remove_old")
                self._checkpoints.remove_old(content.step, config.keep_last, protected)
            except Exception as caught:
                error = caught
        reason = self._ranks.all_gather(None if error is None else _reason(error))[0]
        faults.reached("save.end")
        return reason, error

    def load(self, folder: Path) -> LoadedState:
        """Restore weights, optimizer and random state from a checkpoint of any topology.

        Every rank must call it.

        Raises:
            CheckpointError: if files are missing or damaged.
        """
        faults.reached("load.begin")
        engine = self.engine
        state = layout.read_state(folder)
        if "engine" not in state:
            raise CheckpointError(
                f"{folder} has weights, but no optimizer state to continue with: start a run from "
                f"it with initial_weights={folder}"
            )
        optimizer = TensorReader(files_of(folder, OPTIMIZER))
        load_engine(engine, open_whole_weights(folder, engine.recipe.model), optimizer)
        engine.restore_counts(state["engine"])
        files = files_of(folder, RANK)
        rank = engine.topology.rank
        # Last, because everything above may draw random values.
        if rank < len(files):
            own = read_rank_file(files[rank])
            restore_random_state(own["random"])
        else:
            derive_random_state(engine.recipe.seed, state["step"], rank)
        faults.reached("load.end")
        if len(files) == engine.topology.world_size:
            return LoadedState(state, [own["own"]], len(files))
        return LoadedState(state, [read_rank_file(path)["own"] for path in files], len(files))


def _reason(error: Exception) -> str:
    """Return the cause of a failed write in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:300]
