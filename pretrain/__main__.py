"""One rank of a training, as a module.

That is ``deepspeed --module pretrain``, ``torchrun --module pretrain`` or ``python -m pretrain``.
The command ``moe-pretrain`` and ``launchers/pretrain.py`` are the same.
"""
# PYTHON_ARGCOMPLETE_OK

from __future__ import annotations

import os
import sys
from functools import partial

# `python -m` searches the current folder first, in which any file may hide the library of its name.
# With -P it does not, as with the other ways to start this.
if __name__ == "__main__" and not sys.flags.safe_path:
    os.execv(sys.executable, [sys.executable, "-P", *sys.orig_argv[1:]])

from pretrain.core import startup, supervision

# Before the slow imports.
startup.prepare()
supervision.follow_launcher()

from pretrain.core.errors import run_command
from pretrain.train import main

# The console script moe-pretrain.
command = partial(run_command, main)

if __name__ == "__main__":
    command()
