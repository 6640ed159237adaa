"""A save that ends at each of its events, in forks of one process with an engine.

A case has "name", "folder", "fault" (as in FAULT) and "background". The parent has saved step 1;
the child saves step 2 and meets the fault.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pretrain.checkpoint.layout import complete_checkpoints, damage, read_state
from pretrain.checkpoint.places import pieces
from pretrain.checkpoint.state_hashes import state_hashes
from pretrain.checkpoint.store import CheckpointStore
from pretrain.config.load import load_recipe
from pretrain.core import faults
from pretrain.core.errors import StorageError
from tests.support.rank_worker import make_engine

OVERRIDES = (
    "model.vocab_size=128",
    "train.micro_batch_size=1",
    "train.global_batch_size=2",
    "train.sequence_length=16",
    "checkpoint.keep_last=1",
)
STORAGE_ERROR = 5
_made: dict[str, Any] = {}


def _engine() -> tuple[Any, Any]:
    if not _made:
        recipe = load_recipe("debug", list(OVERRIDES))
        engine, ds_config = make_engine(recipe, 1)
        _made["all"] = (engine, ds_config)
    found: tuple[Any, Any] = _made["all"]
    return found


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    engine, ds_config = _engine()
    folder = Path(case["folder"])
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text("{}")
    store = CheckpointStore(folder / "checkpoints", engine, ds_config, folder / "tokenizer.json")
    store.save(1, {"step": 1})
    first = state_hashes(store.folder / "step_1")
    child = os.fork()
    if child == 0:
        faults.arm({faults.VARIABLE: case["fault"]})
        # No training: threads of collectives and of autograd do not survive a fork.
        for piece in pieces(engine):
            piece.fragment.master.add_(1.0)
        try:
            store.save(2, {"step": 2}, background=case["background"])
            store.finish()
        except StorageError:
            os._exit(STORAGE_ERROR)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left = complete_checkpoints(store.folder)
    newest = store.newest()
    assert newest is not None
    result = {
        "name": case["name"],
        "code": status,
        "newest": newest.name,
        "damage": [damage(path) for path in left],
        "step": read_state(newest)["step"],
        "is_first": state_hashes(newest) == first,
        "torn": [path.name for path in store.folder.glob(".*")],
    }
    # The next save removes what the killed one has left, and is whole.
    store.save(3, {"step": 3})
    result["after"] = sorted(path.name for path in store.folder.iterdir())
    return result
