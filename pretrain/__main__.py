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
from pretrain.core.errors import ConfigError, run_command

# Before the slow imports.
startup.prepare()
try:
    supervision.follow_launcher()
except ConfigError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)

from pretrain.train import main

# The console script moe-pretrain.
command = partial(run_command, main)

if __name__ == "__main__":
    command()
