"""Where a run continues: at its newest checkpoint, or at one of its parent run."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from pretrain.checkpoint import layout
from pretrain.checkpoint.state import CheckpointState, Fingerprint
from pretrain.checkpoint.tokenizer_files import origin_of, read_side_files
from pretrain.config.recipe import Recipe
from pretrain.run.build import ResolvedRun
from pretrain.run.same_run import changes, check_branch, check_same_run
from pretrain.training.trainer import Trainer

logger = logging.getLogger(__name__)


def resume_if_possible(trainer: Trainer, resolved: ResolvedRun) -> Path | None:
    """Restore the trainer from the checkpoint that its run continues from, if there is one.

    Every rank must call it, and gets that checkpoint; None for a new run.

    Raises:
        ConfigError: if the checkpoint is one of another model, tokenizer or order of data.
        CheckpointError: if it is damaged, or ``branch_from`` names none.
        DataError: if the data do not last until the end of the run.
    """
    recipe = resolved.recipe
    store = trainer.checkpoints.store
    fingerprint = trainer.checkpoints.fingerprint
    # Collective, and all ranks must agree: a rank may see damage that the others do not.
    newest = continued = store.newest()
    origin = origin_of(recipe, newest)
    store.side_files = {} if origin is None else read_side_files(origin)
    if newest is not None:
        saved = layout.read_run_recipe(newest)
        state = layout.read_state(newest)
        check_same_run(recipe, saved, fingerprint, state, resolved.folder)
        trainer.resume(newest)
        _announce_changes(recipe, saved, fingerprint, state, resolved.topology.is_main)
    elif recipe.branch_from is not None:
        parent = continued = store.whole(recipe.branch_from)
        saved = layout.read_run_recipe(parent)
        state = layout.read_state(parent)
        check_branch(recipe, saved, fingerprint, state, parent)
        trainer.resume(parent)
        _announce_changes(recipe, saved, fingerprint, state, resolved.topology.is_main)
    # After the resume: a run that has passed over data needs more of them.
    trainer.loader.require(trainer.num_steps)
    return continued


def _announce_changes(
    recipe: Recipe, saved: Recipe, fingerprint: Fingerprint, state: CheckpointState, prints: bool
) -> None:
    """Say in one line what is no longer what the checkpoint was saved with."""
    if prints and (found := changes(recipe, saved, fingerprint, state)):
        line = f"resumed at step {state['step']} with {found}"
        logger.info("%s", line)
        print(line, file=sys.stderr)
