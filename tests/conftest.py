"""What every test gets: this checkout's code, quiet libraries, one thread, and shared fixtures."""

from __future__ import annotations

import os

from pretrain.core.startup import quiet_libraries
from tests.support.paths import ROOT

pytest_plugins = (
    "tests.support.data_fixtures",
    "tests.support.model_fixtures",
    "tests.support.run_fixtures",
)

# Processes that tests start must import this checkout, whichever one the environment has installed.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
)
# Models here are tiny: more threads would only wait for each other, above all when two workers and
# the ranks they start share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
quiet_libraries()
