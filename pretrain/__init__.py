"""Distributed pretraining of mixture-of-experts language models on DeepSpeed."""

import logging
import warnings

# DeepSpeed gives its logger a handler on standard output while it is imported, and warns there about ordinary things (a machine without a
# GPU). This filter is in place before: its messages go to the root logger (a run's log.txt), and standard output stays ours.


def _to_root_logger(record: logging.LogRecord) -> bool:
    logging.getLogger("deepspeed").handle(record)
    return False


logging.getLogger("DeepSpeed").addFilter(_to_root_logger)
logging.getLogger().addHandler(
    logging.NullHandler()
)  # without any handler, Python prints warnings to standard error
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
