"""What the first, second and third signal do: real signals to this process."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from pretrain.core.signals import STOP_SIGNALS, StopRequest


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_each_signal_is_a_request(number: signal.Signals) -> None:
    stop = StopRequest()
    stop.install()
    signal.raise_signal(number)
    assert stop.requested


def test_an_ignored_sighup_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopRequest()
    stop.install()
    signal.raise_signal(signal.SIGHUP)
    assert not stop.requested


def test_a_second_ctrl_c_interrupts_a_step() -> None:
    stop = StopRequest()
    stop.install()
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_second_ctrl_c_lets_a_save_finish_and_a_third_interrupts_it(
    first: signal.Signals,
) -> None:
    stop = StopRequest()
    stop.install()
    signal.raise_signal(first)
    with pytest.raises(KeyboardInterrupt), stop.saving():
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        signal.raise_signal(signal.SIGINT)


def test_a_further_sigterm_never_interrupts() -> None:
    stop = StopRequest()
    stop.install()
    for _ in range(3):
        signal.raise_signal(signal.SIGTERM)
    with stop.saving():
        signal.raise_signal(signal.SIGTERM)


def test_between_the_agreement_to_stop_and_the_save_ctrl_c_waits_too() -> None:
    stop = StopRequest()
    stop.install()
    signal.raise_signal(signal.SIGTERM)
    stop.note_agreed()
    signal.raise_signal(signal.SIGINT)


WRITER = """\
import sys
from pretrain.core.terminal import survive_hangup
if "survive" in sys.argv:
    survive_hangup()
print("ready", flush=True)
sys.stdin.readline()
print("one", flush=True)
print("two", file=sys.stderr, flush=True)
"""


@pytest.mark.parametrize(("mode", "ends_well"), [("survive", True), ("plain", False)])
def test_output_outlasts_its_terminal(mode: str, ends_well: bool) -> None:
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, mode], stdin=subprocess.PIPE, stdout=slave, stderr=slave
    )
    os.close(slave)
    assert os.read(master, 100).startswith(b"ready")
    os.close(master)
    process.communicate(b"\n", timeout=60)
    assert (process.returncode == 0) == ends_well
