"""Tests' models are tiny: more threads only wait for each other, most of all beside another process on the same cores."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
