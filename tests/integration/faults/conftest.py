from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pretrain.core.errors import run_command
from pretrain.train import main
from tests.support.tiny_run import Tiny, own_process

Command = Callable[[list[str]], tuple[int, str]]


@pytest.fixture(autouse=True)
def in_process() -> Iterator[None]:
    """Every test here may call the training command inside its own process."""
    with own_process():
        yield


@pytest.fixture
def train(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the training command to its end and returns its exit code and what it printed on
    standard error.
    """

    def call(arguments: list[str]) -> tuple[int, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_command(lambda: main(arguments))
        return int(ended.value.code or 0), capsys.readouterr().err

    return call


@pytest.fixture(scope="session")
def six_steps(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of six steps with checkpoints of steps 3 and 6; tests copy it."""
    run = tmp_path_factory.mktemp("six") / "run"
    with own_process():
        assert main(tiny.arguments(run, steps=6)) == 0
    return run
