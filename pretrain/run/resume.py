"""Where a run continues: at its newest checkpoint, or at one of its parent run."""

from __future__ import annotations

from pretrain.checkpoint import layout
from pretrain.checkpoint.tokenizer_files import origin_of, read_side_files
from pretrain.run.build import ResolvedRun
from pretrain.run.same_run import check_branch, check_same_run
from pretrain.training.trainer import Trainer


def resume_if_possible(trainer: Trainer, resolved: ResolvedRun) -> None:
    """Restore the trainer from the checkpoint that its run continues from, if there is one.

    Every rank must call it.

    Raises:
        ConfigError: if the checkpoint is one of another model, tokenizer, order of data or
            topology.
        CheckpointError: if it is damaged, or ``branch_from`` names none.
        DataError: if the data do not last until the end of the run.
    """
    recipe = resolved.recipe
    store = trainer.checkpoints.store
    fingerprint = trainer.checkpoints.fingerprint
    # Collective, and all ranks must agree: a rank may see damage that the others do not.
    newest = store.newest()
    origin = origin_of(recipe, newest)
    store.side_files = {} if origin is None else read_side_files(origin)
    if newest is not None:
        saved = layout.read_run_recipe(newest)
        check_same_run(recipe, saved, fingerprint, layout.read_state(newest), resolved.folder)
        trainer.resume(newest)
    elif recipe.branch_from is not None:
        parent = store.whole(recipe.branch_from)
        saved = layout.read_run_recipe(parent)
        check_branch(recipe, saved, fingerprint, layout.read_state(parent), parent)
        trainer.resume(parent)
    # After the resume: a run that has passed over data needs more of them.
    trainer.loader.require(trainer.num_steps)
