"""Runs ``torchrun``, and ends with the exit code of the rank that failed first, not with 1."""

from __future__ import annotations

import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        # The end by signal N is reported as -N; a shell has 128 + N.
        sys.exit(code if code > 0 else 128 - code)
