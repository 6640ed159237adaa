"""One rank of a training, as a module: ``deepspeed --module pretrain``, ``torchrun --module pretrain``, ``python -m pretrain``.

The command ``moe-pretrain`` and ``launchers/pretrain.py`` are the same.
"""
# PYTHON_ARGCOMPLETE_OK

from __future__ import annotations

from functools import partial

from pretrain.core import startup

startup.prepare()  # before the slow imports

from pretrain.core.errors import run_command
from pretrain.train import main

command = partial(run_command, main)  # moe-pretrain

if __name__ == "__main__":
    command()
