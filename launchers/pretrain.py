"""The script that every launcher starts; see ``python launchers/pretrain.py --help``."""

import sys
from pathlib import Path

# Python puts this script's folder first on the path, where this very file would stand for the package of the same name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pretrain.config import interrupts  # noqa: E402

interrupts.install()

from pretrain.config.errors import run_command  # noqa: E402
from pretrain.train import main  # noqa: E402

if __name__ == "__main__":
    run_command(main)
