"""A user's package outside of the tree, with parts of several families."""

import os
from pathlib import Path

# The test's canary: every process that executes this module leaves its number.
if folder := os.environ.get("MY_PARTS_CANARY"):
    (Path(folder) / str(os.getpid())).touch()

from my_parts import callback, guard, router, schedule, source, target  # noqa: F401
