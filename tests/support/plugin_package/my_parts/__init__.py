"""A user's package outside of the tree: a router, a schedule, a callback, a guard and an export
target.
"""

import os
from pathlib import Path

# The test's canary: every process that executes this module leaves its number.
if folder := os.environ.get("MY_PARTS_CANARY"):
    (Path(folder) / str(os.getpid())).touch()

from my_parts import callback, guard, router, schedule, target  # noqa: F401
