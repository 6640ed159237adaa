"""One rank of a training, as a module: ``deepspeed --module pretrain``, ``torchrun --module
pretrain``, ``python -m pretrain``.

The command ``moe-pretrain`` and ``launchers/pretrain.py`` are the same.
"""
# PYTHON_ARGCOMPLETE_OK

from __future__ import annotations

import os
import sys
from functools import partial

# `python -m` searches the current folder first, in which a file of any name may hide a library of
# that name. With -P it does not, as with the other ways to start this.
if __name__ == "__main__" and not sys.flags.safe_path:
    os.execv(sys.executable, [sys.executable, "-P", *sys.orig_argv[1:]])

from pretrain.core import startup

startup.prepare()  # before the slow imports

from pretrain.core.errors import run_command
from pretrain.train import main

command = partial(run_command, main)  # moe-pretrain

if __name__ == "__main__":
    command()
