"""log.txt: no credential in it, and no traceback on the terminal if it cannot be written."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from pretrain.run.folder import LOG, log_to_file


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    """The root logger is as before after each test."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    logging.captureWarnings(False)


def test_credentials_in_messages_and_tracebacks_are_redacted(tmp_path: Path) -> None:
    log_to_file(tmp_path, 0)
    logging.getLogger("some.package").info("opening %s", "https://me:pa55word@host/x")
    try:
        raise ValueError("hf_" + "a" * 34)
    except ValueError:
        logging.getLogger("some.package").exception("it failed")
    text = (tmp_path / LOG).read_text()
    assert "https://[redacted]@host/x" in text and "ValueError: [redacted]" in text
    assert "pa55word" not in text and "aaaa" not in text


def test_a_full_disk_is_one_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / LOG).symlink_to("/dev/full")
    log_to_file(tmp_path, 0)
    for _ in range(3):
        logging.getLogger("some.package").info("something")
    errors = capsys.readouterr().err
    assert errors == f"warning: cannot write {tmp_path / LOG}: No space left on device\n"
