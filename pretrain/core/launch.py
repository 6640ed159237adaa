"""The environment of a training that this process starts, also if a launcher has started it."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

# Set by launchers and batch systems for their own ranks: inherited, they would make a training wait
# for ranks that do not exist.
OF_A_RANK = re.compile(
    r"^(SLURM_(STEP_ID|PROCID|LOCALID|NTASKS)|PMI_.*|PMIX_.*|OMPI_.*|MASTER_(ADDR|PORT)"
    r"|((LOCAL|CROSS)_)?(RANK|SIZE|WORLD_SIZE))$"
)


def training_environment() -> dict[str, str]:
    """This process's environment, without what makes it a rank."""
    environment = {name: value for name, value in os.environ.items() if not OF_A_RANK.match(name)}
    # Launchers are next to this Python, whose environment may not be active.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    return environment
