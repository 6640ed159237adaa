"""The first steps of a command, before its slow imports."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path

from pretrain.core import faults, interrupts
from pretrain.core.shipped import CHECKOUT


def prepare() -> None:
    """Make Ctrl-C end the process cleanly, and keep standard output for the command's results.

    A command calls it between its first import and the slow ones: torch and DeepSpeed take seconds
    to import, and DeepSpeed already writes to standard output meanwhile.
    """
    interrupts.install()
    refuse_other_checkout()
    faults.arm_or_exit(os.environ)
    same_products_at_any_address()
    quiet_libraries()


def refuse_other_checkout() -> None:
    """Exit if the environment would run the code of another checkout than the script's.

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


def same_products_at_any_address() -> None:
    """Let MKL compute the same bits wherever its matrices are in memory.

    Without it, the last bit of a product depends on the alignment of its operands on processors
    with AVX-512 (Intel, "Conditional Numerical Reproducibility"): a weight that was read from a
    file would differ from the same one in a model. It must be set before the first product; its
    cost was within the noise.
    """
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


def quiet_libraries() -> None:
    """Send library logs (DeepSpeed, torch) to the root logger, which is a run's ``log.txt``.

    A second call changes nothing.
    """
    # DeepSpeed gives its logger a handler on standard output when it is imported, and warns there
    # about ordinary things (a machine without a GPU). A filter of the logger itself acts before any
    # handler, so it works whether it is added before or after that import.
    logging.getLogger("DeepSpeed").addFilter(_to_root_logger)
    root = logging.getLogger()
    # Without any handler, Python prints warnings to standard error.
    if not root.handlers:
        root.addHandler(logging.NullHandler())
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


def _to_root_logger(record: logging.LogRecord) -> bool:
    # Under another name than DeepSpeed's own: a logger below "DeepSpeed" would come back to this
    # filter.
    logging.getLogger("deepspeed").handle(record)
    return False
