"""Importing the packages changes nothing; a command asks for what changes the process, and only
then.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

STATE = """\
import json, logging, signal, sys, warnings
def state():
    root, theirs = logging.getLogger(), logging.getLogger("DeepSpeed")
    return [[repr(part) for part in (root.handlers, root.filters, root.level, theirs.handlers, theirs.filters, warnings.filters)],
            repr(signal.getsignal(signal.SIGINT)), repr(sys.excepthook)]
before = state()
"""
COMPARE = """
after = state()
print(json.dumps([before == after, sorted({"torch", "deepspeed", "numpy"} & sys.modules.keys())]))
"""
# DeepSpeed's own import gives its logger a handler on standard output.
LOUD = """\
import logging, sys
from deepspeed.utils import logger
logger.warning("the first warning")
from pretrain.core.startup import quiet_libraries
quiet_libraries()
quiet_libraries()
assert len(logger.filters) == 1
logger.warning("the second warning")
kept = []
class Keep(logging.Handler):
    def emit(self, record): kept.append(record.getMessage())
logging.getLogger().addHandler(Keep())
logger.warning("the third warning")
assert kept == ["the third warning"], kept
"""


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True
    )


@pytest.mark.parametrize("package", ["pretrain", "data_pipeline", "pretrain.core.startup", "tools"])
def test_an_import_changes_nothing_and_is_light(package: str) -> None:
    assert json.loads(run(f"{STATE}import {package}{COMPARE}").stdout) == [True, []]


def test_a_command_s_start_changes_the_process_and_the_comparison_sees_it() -> None:
    program = f"{STATE}from pretrain.core import startup; startup.prepare(){COMPARE}"
    assert json.loads(run(program).stdout) == [False, []]


def test_deepspeed_is_quiet_once_asked_to_be_and_its_records_reach_the_root_logger() -> None:
    done = run(LOUD)
    assert "the first warning" in done.stdout + done.stderr
    assert "the second warning" not in done.stdout + done.stderr
    assert "the third warning" not in done.stdout + done.stderr
