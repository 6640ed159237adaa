"""How a checkpoint appears whole, and how an old one goes: temporary names, fsync, one rename.

A process may be killed, or a machine lose power, between any two statements here. What has its
final name is complete at all times.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from pretrain.checkpoint import layout
from pretrain.checkpoint.ledger import Ledger
from pretrain.checkpoint.saving import SavingRanks
from pretrain.core import faults
from pretrain.core.errors import StorageError
from pretrain.core.files import fsync_path, make_durable_folder
from pretrain.engine.topology import Topology

logger = logging.getLogger(__name__)

# Of the tensors' bytes: headers, recipe, tokenizer and model card are small beside them.
SPACE_MARGIN = 1.02
SMALL_FILES_BYTES = 20_000_000


def first_fault(folder: Path, topology: Topology) -> str | None:
    """Return what is wrong with a checkpoint, the same on every rank; None if it is whole.

    The ranks share the hashing. Every rank must call it.
    """
    found = topology.all_gather(layout.damage(folder, topology.rank, topology.world_size))
    return next((fault for fault in found if fault), None)


class CheckpointFolder:
    """The folder of a run's checkpoints, on storage that all ranks share."""

    def __init__(self, path: Path, ranks: SavingRanks) -> None:
        self.path = path
        self.ranks = ranks

    def prepare(self, target: Path, bytes_to_write: int) -> Path:
        """Make an empty temporary folder for ``target``, and check the free space.

        Every rank must call it, and gets the folder.

        Args:
            bytes_to_write: of this rank's tensors.

        Raises:
            StorageError: if it cannot be made or the disk is too full; on every rank.
        """
        temporary = target.with_name(f".{target.name}.tmp")
        needed = sum(self.ranks.all_gather(bytes_to_write))
        problem = ""
        if self.ranks.is_main:
            try:
                shutil.rmtree(temporary, ignore_errors=True)
                make_durable_folder(temporary)
                problem = self._shortage(int(SPACE_MARGIN * needed) + SMALL_FILES_BYTES)
            except OSError as error:
                problem = f"cannot make {temporary}: {error.strerror}"
        # Also the barrier behind which the others may write into the folder.
        problem = self.ranks.all_gather(problem)[0]
        if problem:
            if self.ranks.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise StorageError(
                f"{problem}; free space or set another run_path, then run the same command"
            )
        return temporary

    def _shortage(self, needed: int) -> str:
        """Return a sentence if the disk is too full for ``needed`` bytes."""
        free = shutil.disk_usage(self.path).free
        if free >= needed:
            return ""
        return (
            f"disk full: a checkpoint needs {needed / 1e6:.0f} MB, "
            f"{self.path} has {free / 1e6:.0f} MB"
        )

    def publish(
        self,
        temporary: Path,
        target: Path,
        files: Mapping[str, layout.FileEntry],
        ledger: Ledger | None = None,
    ) -> None:
        """Write the manifest, give the folder its name, move ``latest``; rank 0 does.

        Args:
            files: all of them, written and synced.
            ledger: of the run; None if none is kept.
        """
        faults.reached("save.manifest")
        manifest = layout.write_manifest(temporary, files)
        # The content and the names inside the folder must be on disk before the rename is: a file
        # system may write the rename first.
        for path in (manifest, temporary):
            fsync_path(path)
        # Before the name: a kill in between leaves a record too many, never one too few.
        if ledger is not None:
            ledger.checkpoint(layout.step_of(target), manifest)
        # A folder that is not empty cannot be replaced. It is there if the run began before a
        # damaged checkpoint of the same step.
        if target.exists():
            self._set_aside(target)
        faults.reached("save.rename")
        os.replace(temporary, target)
        faults.reached("save.pointer")
        layout.write_pointer(self.path, target.name)

    def point(self, steps: Mapping[str, int]) -> None:
        """Write the pointers to checkpoints that are there, and remove all others but ``latest``.

        Args:
            steps: by the pointer's name.
        """
        wanted = {
            name: layout.step_folder(self.path, step).name
            for name, step in steps.items()
            if layout.step_folder(self.path, step).is_dir()
        }
        for name, target in layout.pointers(self.path).items():
            if name != layout.LATEST and name not in wanted:
                (self.path / name).unlink()
            elif wanted.get(name) == target:
                del wanted[name]
        for name, target in wanted.items():
            layout.write_pointer(self.path, target, name)

    def remove_old(self, step: int, keep_last: int, protected: Collection[int]) -> None:
        """Remove what need not be kept after a save at ``step``.

        Checkpoints of later steps were damaged when the run began: they are removed too, and do not
        count among the ``keep_last`` newest ones.

        Args:
            protected: steps whose checkpoints stay.
        """
        folders = layout.complete_checkpoints(self.path)
        later = [folder for folder in folders if layout.step_of(folder) > step]
        for folder in later:
            logger.warning(
                "removed %s: the run began before it, and has saved step %d", folder, step
            )
        old = folders[len(later) + keep_last :]
        for folder in [*later, *old]:
            if folder in later or layout.step_of(folder) not in protected:
                self._set_aside(folder)
        self._clear()

    def first_of_each(self, hours: float) -> set[int]:
        """Return the steps of the oldest checkpoints that were saved in each ``hours`` hours."""
        found: dict[int, int] = {}
        for folder in reversed(layout.complete_checkpoints(self.path)):
            saved_at = layout.read_state(folder).get("saved_at")
            if saved_at is not None:
                found.setdefault(int(saved_at / (3600 * hours)), layout.step_of(folder))
        return set(found.values())

    def remove_from(self, step: int, kept: Path) -> None:
        """Remove the checkpoints of ``step`` and later ones, because the run goes back to ``kept``.

        ``latest`` moves first, so that it names a complete checkpoint at all times.
        """
        if kept.parent == self.path:
            layout.write_pointer(self.path, kept.name)
        for folder in layout.complete_checkpoints(self.path):
            if layout.step_of(folder) >= step:
                logger.warning("removed %s: the run goes back to %s", folder, kept)
                self._set_aside(folder)
        for name, target in layout.pointers(self.path).items():
            if not (self.path / target).is_dir():
                (self.path / name).unlink()
        self._clear()

    def _set_aside(self, folder: Path) -> None:
        """Give a checkpoint that goes a temporary name.

        A kill while its files are removed then leaves no torn folder under a final name.
        """
        aside = folder.with_name(f".{folder.name}.removed.tmp")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(folder, aside)

    def _clear(self) -> None:
        """Remove what has a temporary name, also what an earlier process left behind."""
        for torn in self.path.glob(".step_*.tmp"):
            shutil.rmtree(torn, ignore_errors=True)
