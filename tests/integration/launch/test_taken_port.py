"""A process alone does not need a certain port: one that was taken meanwhile is replaced."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

from tests.support.tiny_run import SCRIPT, Started, Tiny


def test_a_run_of_one_process_takes_another_port(tiny: Tiny, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        command = [sys.executable, SCRIPT, *tiny.arguments(tmp_path / "run", steps=2)]
        started = Started(command, tmp_path, place | alone)
        assert started.wait() == 0, started.stderr
