"""Saves and loads a running engine.

A checkpoint is written under a temporary name, checked, and published with one rename
(``publication.py``).
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pretrain.checkpoint import layout
from pretrain.checkpoint.group_options import group_options, restore_group_options
from pretrain.checkpoint.model_card import model_card
from pretrain.checkpoint.publication import CheckpointFolder, first_fault
from pretrain.checkpoint.random_state import random_state, restore_random_state
from pretrain.checkpoint.state import CheckpointState, RankState
from pretrain.checkpoint.tokenizer_files import SideFiles, write_side_files
from pretrain.checkpoint.weights import read_experts_part, write_weights
from pretrain.config.load import recipe_to_yaml
from pretrain.core.errors import CheckpointError, StorageError, is_peer_loss
from pretrain.core.files import JsonObject
from pretrain.engine.engine import Engine

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedState:
    """What a checkpoint holds next to what was restored into the engine.

    Attributes:
        rank_state: what this rank saved.
    """

    state: CheckpointState
    rank_state: RankState


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: ``runs/<name>/checkpoints``, on storage that all ranks share.
        tokenizer: copied into each checkpoint, so that it can be used alone.

    Attributes:
        side_files: what belongs to the tokenizer and is written into each checkpoint with it.
    """

    def __init__(
        self, folder: Path, engine: Engine, ds_config: JsonObject, tokenizer: Path
    ) -> None:
        self.folder = folder
        self.engine = engine
        self.ds_config = ds_config
        self.tokenizer = tokenizer
        self.side_files: SideFiles = {}
        self._checkpoints = CheckpointFolder(folder, engine.topology)

    def save(
        self,
        step: int,
        state: CheckpointState,
        pointers: Mapping[str, int] | None = None,
        rank_state: RankState | None = None,
    ) -> Path:
        """Publish ``step_<step>``, move ``latest`` to it, and remove old checkpoints.

        Every rank must call it.

        Args:
            state: written to ``state.json``.
            pointers: steps by the pointer that names them; these checkpoints are kept in addition
                to the newest ``checkpoint.keep_last``.
            rank_state: of this rank.

        Raises:
            StorageError: if space does not suffice or writing fails; older checkpoints are
                untouched.
        """
        pointers = pointers or {}
        topology = self.engine.topology
        target = layout.step_folder(self.folder, step)
        temporary = self._checkpoints.prepare(target)
        try:
            self._write_rank(temporary, rank_state or {})
            # Collective. save_latest=False: DeepSpeed's "latest" would be written before the
            # checkpoint is whole; layout.LATEST moves after the rename.
            self.engine.deepspeed.save_checkpoint(
                str(temporary), tag=layout.DEEPSPEED_TAG, save_latest=False
            )
            if topology.is_main:
                self._write_shared(temporary, state)
        except (OSError, RuntimeError, SafetensorError) as error:
            # torch's writer reports a full disk as a RuntimeError, safetensors' as its own. The
            # other ranks notice when this one is gone.
            if is_peer_loss(error):
                raise
            shutil.rmtree(temporary, ignore_errors=True)
            raise StorageError(
                f"cannot write the checkpoint of step {step} to {self.folder}: {_reason(error)}; "
                "free space and run the same command"
            ) from error
        # Every file must be there before a rank lists them for its share of the manifest.
        topology.barrier()
        self._checkpoints.publish(temporary, target)
        if topology.is_main:
            self._checkpoints.point(pointers)
            keep_last = self.engine.recipe.checkpoint.keep_last
            self._checkpoints.remove_old(step, keep_last, set(pointers.values()))
        topology.barrier()
        return target

    def _write_rank(self, folder: Path, rank_state: RankState) -> None:
        """Write this rank's random state, weights and optimizer state of tables."""
        engine = self.engine
        rank = engine.topology.rank
        # exist_ok: every rank makes the folder.
        (folder / layout.RANDOM_FOLDER).mkdir(exist_ok=True)
        torch.save(
            {**random_state(), "own": rank_state},
            layout.rank_file(folder / layout.RANDOM_FOLDER, rank, "pt"),
        )
        tables = {}
        if engine.sparse_optimizer is not None:
            tables = {name: table.weight for name, table in engine.sparse_optimizer.tables.items()}
        write_weights(
            folder,
            engine.model,
            engine.masters.whole,
            rank,
            engine.expert_parts,
            engine.recipe.model.total_experts,
            tables,
        )
        self._write_tables(folder)

    def _write_shared(self, folder: Path, state: CheckpointState) -> None:
        """Write what is the same for all ranks; rank 0 does."""
        # DeepSpeed adds scripts that convert to fp32. They take expert files for model files.
        for script in folder.glob("zero_to_*.py"):
            script.unlink()
        recipe = self.engine.recipe
        (folder / layout.RECIPE).write_text(recipe_to_yaml(recipe), encoding="utf-8")
        ds_config = json.dumps(self.ds_config, indent=2)
        (folder / layout.DS_CONFIG).write_text(ds_config, encoding="utf-8")
        (folder / layout.STATE).write_text(json.dumps(state, indent=2), encoding="utf-8")
        shutil.copyfile(self.tokenizer, folder / layout.TOKENIZER)
        write_side_files(self.side_files, folder)
        (folder / layout.CARD).write_text(model_card(recipe, state), encoding="utf-8")

    def go_back(self, step: int, parent: Path | None = None) -> Path | None:
        """Remove the checkpoints from step ``step`` on, and return the newest whole one before.

        If there is none, nothing is removed and None is returned. Every rank must call it.

        Args:
            parent: a checkpoint of another run, to go back to if this run has none and it is of a
                step before ``step``.
        """
        kept = self.newest(before=step)
        if kept is None and parent is not None and layout.read_state(parent)["step"] < step:
            kept = parent
        topology = self.engine.topology
        if kept is not None and topology.is_main:
            self._checkpoints.remove_from(step, kept)
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

    def load(self, folder: Path) -> LoadedState:
        """Restore weights, optimizer and random state from a checkpoint.

        Every rank must call it.

        Raises:
            CheckpointError: if DeepSpeed finds nothing in the folder.
        """
        optimizer = self.engine.optimizer
        options = group_options(optimizer.param_groups)
        # The schedule is a function of the step here, so DeepSpeed has no state of one.
        loaded, _ = self.engine.deepspeed.load_checkpoint(
            str(folder), tag=layout.DEEPSPEED_TAG, load_lr_scheduler_states=False
        )
        if loaded is None:
            raise CheckpointError(
                f"DeepSpeed found nothing to load in {folder}: the checkpoint is damaged, "
                "choose another or start over with --fresh"
            )
        # With the moments come the checkpoint's weight decay, betas and clipping, but those of the
        # recipe must hold.
        restore_group_options(optimizer.param_groups, options)
        if hasattr(optimizer, "clip_grad"):
            optimizer.clip_grad = self.engine.recipe.train.grad_clip
        self._load_tables(folder)
        # Last, because everything above may draw random values.
        rank = self.engine.topology.rank
        path = layout.rank_file(folder / layout.RANDOM_FOLDER, rank, "pt")
        # weights_only: a checkpoint may come from somebody else, and a pickle may run anything.
        content = torch.load(path, weights_only=True)
        restore_random_state(content)
        return LoadedState(layout.read_state(folder), content.get("own", {}))

    def _write_tables(self, folder: Path) -> None:
        """Write the optimizer state of expert tables, which DeepSpeed does not know.

        Only rows that were ever used are in it.
        """
        sparse = self.engine.sparse_optimizer
        if sparse is None:
            return
        (folder / layout.ROWS_FOLDER).mkdir(exist_ok=True)
        tensors = {
            f"{name}/{key}": value.cpu()
            for name, table_state in sparse.states.items()
            for key, value in table_state.state().items()
        }
        rank = self.engine.topology.rank
        save_file(tensors, layout.rank_file(folder / layout.ROWS_FOLDER, rank, "safetensors"))

    def _load_tables(self, folder: Path) -> None:
        engine = self.engine
        sparse = engine.sparse_optimizer
        if sparse is None:
            return
        weights = read_experts_part(folder, engine.expert_part, engine.expert_parts)
        rank = engine.topology.rank
        state = load_file(layout.rank_file(folder / layout.ROWS_FOLDER, rank, "safetensors"))
        # In place: the optimizer and the layer hold the same tensor.
        for name, table in sparse.tables.items():
            table.weight.copy_(weights[name])
            prefix = f"{name}/"
            sparse.states[name].load(
                {
                    key.removeprefix(prefix): value
                    for key, value in state.items()
                    if key.startswith(prefix)
                }
            )


def _reason(error: Exception) -> str:
    """Return the cause of a failed write in one line."""
    if isinstance(error, OSError):
        return str(error.strerror)
    return " ".join(str(error).split())[:200]
