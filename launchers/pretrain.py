"""The script that every launcher starts; see ``python launchers/pretrain.py --help``."""

import sys
from pathlib import Path

# Python puts this script's folder first on the path, in which this very file would be taken for the
# package of the same name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pretrain.core import interrupts

interrupts.install()

from pretrain.core.errors import run_command
from pretrain.train import main

if __name__ == "__main__":
    run_command(main)
