"""The first thing that a command does, before its slow imports."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

from pretrain.core import interrupts
from pretrain.core.shipped import CHECKOUT


def prepare() -> None:
    """Make Ctrl-C end the process with one sentence, and leave standard output to the command's own
    results.

    A command calls it between its first import and the slow ones: torch and DeepSpeed take seconds
    to import, and DeepSpeed already writes to standard output meanwhile.
    """
    interrupts.install()
    refuse_other_checkout()
    quiet_libraries()


def refuse_other_checkout() -> None:
    """End a script of a checkout whose environment would run the code of another one.

    An editable install knows one checkout. A second one with the same environment would otherwise
    silently run the first one's code.
    """
    checkout = Path(sys.argv[0]).resolve().parent.parent
    is_script = (checkout / "pretrain" / "core").is_dir()
    if is_script and CHECKOUT is not None and checkout != CHECKOUT:
        print(
            f"error: {sys.argv[0]} would run the code of {CHECKOUT}, which this Python has "
            f"installed: run `pip install -e {checkout}`, or set PYTHONPATH={checkout}",
            file=sys.stderr,
        )
        sys.exit(2)


def quiet_libraries() -> None:
    """Send what DeepSpeed, torch and others report to the root logger, which is a run's
    ``log.txt``.

    A second call changes nothing.
    """
    # DeepSpeed gives its logger a handler on standard output when it is imported, and warns there
    # about ordinary things (a machine without a GPU). A filter of the logger itself acts before any
    # handler, so it works whether it is added before or after that import.
    logging.getLogger("DeepSpeed").addFilter(_to_root_logger)
    root = logging.getLogger()
    if not root.handlers:  # without any handler, Python prints warnings to standard error
        root.addHandler(logging.NullHandler())
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


def _to_root_logger(record: logging.LogRecord) -> bool:
    # By another name than DeepSpeed's own: a logger below "DeepSpeed" would come back to this
    # filter.
    logging.getLogger("deepspeed").handle(record)
    return False
