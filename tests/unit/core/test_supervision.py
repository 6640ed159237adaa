"""Times that the environment sets for ranks and launchers are numbers of seconds, or refused."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pretrain.core import supervision
from pretrain.core.errors import USAGE, ConfigError
from tests.support.paths import LAUNCHERS


@pytest.mark.parametrize("text", ["", "0", "2.5", " 90 ", "86400"])
def test_seconds_are_read(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(supervision.GRACE, text)
    assert supervision.grace_seconds() == float(text or supervision.DEFAULT_GRACE_SECONDS)


@pytest.mark.parametrize("text", ["soon", "-1", "nan", "inf", "1e9", "2s"])
@pytest.mark.parametrize(
    ("variable", "read"),
    [
        (supervision.GRACE, supervision.grace_seconds),
        (supervision.LAUNCHER_PATIENCE, supervision.launcher_seconds),
    ],
)
def test_what_is_no_number_of_seconds_is_refused(
    monkeypatch: pytest.MonkeyPatch, variable: str, read: object, text: str
) -> None:
    monkeypatch.setenv(variable, text)
    with pytest.raises(ConfigError, match=f"{variable}={text} is no number of seconds"):
        read()  # type: ignore[operator]


@pytest.mark.parametrize("variable", [supervision.GRACE, supervision.LAUNCHER_PATIENCE])
def test_the_supervisor_says_it_before_it_starts_anything(variable: str) -> None:
    ended = subprocess.run(
        [sys.executable, str(LAUNCHERS / "supervise.py"), "echo", "started"],
        env=os.environ | {variable: "soon"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (USAGE, "")
    assert f"{variable}=soon is no number of seconds" in ended.stderr


def test_a_launcher_that_is_not_there_is_a_sentence() -> None:
    ended = subprocess.run(
        [sys.executable, str(LAUNCHERS / "supervise.py"), "no-such-launcher"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == USAGE
    assert "no-such-launcher cannot be started (No such file or directory)" in ended.stderr
    assert "Traceback" not in ended.stderr
