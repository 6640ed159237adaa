"""What holds for every test: this checkout's code, quiet libraries, one thread."""

from __future__ import annotations

import os
from pathlib import Path

from pretrain.core.startup import quiet_libraries

ROOT = Path(__file__).resolve().parents[1]
# Processes that tests start import the code of this checkout, whichever one the environment has
# installed.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
)
# Models here are tiny: more threads only wait for each other, most of all in parallel with another
# process on the same cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
quiet_libraries()
