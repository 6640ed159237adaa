"""The script that every launcher starts; see ``python launchers/pretrain.py --help``."""

import os
import sys

# Python searches a script's folder first, in which this file hides the package of the same name.
# With -P it does not, so the script replaces itself by a Python with -P: the process, its
# arguments, environment and open files stay the same.
if __name__ == "__main__" and not sys.flags.safe_path:
    os.execv(sys.executable, [sys.executable, "-P", *sys.orig_argv[1:]])

from pretrain.__main__ import command  # not found? Run `pip install -e .` in the checkout.

if __name__ == "__main__":
    command()
