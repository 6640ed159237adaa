"""A plugin that makes two ranks load one weight a little wrong, which a resume check must find."""

from __future__ import annotations

import os
from typing import Any

from pretrain.checkpoint import store

load_engine = store.load_engine


def load_wrong(engine: Any, *files: Any) -> None:
    """Loads, and changes the first weight of this rank in its last digits."""
    load_engine(engine, *files)
    if os.environ.get("WORLD_SIZE") == "2":
        from pretrain.checkpoint.places import pieces

        pieces(engine)[0].fragment.master.mul_(1 + 1e-6)


store.load_engine = load_wrong
