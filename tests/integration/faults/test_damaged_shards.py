"""One low bit of a shard: every token id is still of the vocabulary, so that nothing but a checksum
can see it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.core.errors import BAD_DATA
from tests.support.paths import LAUNCHERS
from tests.support.tiny_run import Started, Tiny

Command = Callable[[list[str]], tuple[int, str]]


@pytest.fixture
def data(tiny: Tiny, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny.data, tmp_path / "data"))


def flip_low_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 4 * 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("how", ["sample", "full"])
@pytest.mark.parametrize("name", ["train.bin", "validation.bin"])
def test_a_flipped_low_bit_stops_training_before_its_first_checkpoint(
    tiny: Tiny, data: Path, tmp_path: Path, train: Command, how: str, name: str
) -> None:
    flip_low_bit(data / name)
    run = tmp_path / "run"
    code, message = train(
        tiny.arguments(
            run, f"data.path={data}", f"data.verify={how}", "checkpoint.interval_steps=1", steps=3
        )
    )
    assert code == BAD_DATA and "Traceback" not in message
    size = (data / name).stat().st_size
    assert (
        f"{data / name}, block 0 of 1 (bytes 0 to {size - 1:,})" in message
        and "tools/verify_data.py" in message
    )
    assert (
        not list(run.glob("checkpoints/step_*")) and not (run / "checkpoints" / "latest").exists()
    )


def test_sizes_alone_do_not_see_it(tiny: Tiny, data: Path, tmp_path: Path, train: Command) -> None:
    flip_low_bit(data / "train.bin")
    code, message = train(
        tiny.arguments(tmp_path / "run", f"data.path={data}", "data.verify=sizes", steps=2)
    )
    assert code == 0, message


def test_what_one_rank_finds_stops_all_of_them(tiny: Tiny, data: Path, tmp_path: Path) -> None:
    # Of the four files, in the order that the ranks share them in, validation.bin is the second
    # one's.
    flip_low_bit(data / "validation.bin")
    run = tmp_path / "run"
    settings = (f"data.path={data}", "parallel.ep_size=2", "checkpoint.interval_steps=1")
    started = Started(
        [LAUNCHERS / "run_mpi.sh", *tiny.arguments(run, *settings, steps=3)], tmp_path
    )
    assert started.wait() == BAD_DATA, started.stderr
    assert "validation.bin, block 0 of 1" in started.stderr and "Traceback" not in started.stderr
    assert started.survivors() == []
    assert not list(run.glob("checkpoints/step_*"))
