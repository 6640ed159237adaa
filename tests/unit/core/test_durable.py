from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pretrain.core.errors import ConfigError
from pretrain.core.files import appearing_folder, make_durable_folder, only_writer, write_synced
from tests.support.paths import ROOT


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(ZeroDivisionError), appearing_folder(output) as folder:
        (folder / "file").write_text("half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with appearing_folder(output) as folder:
        (folder / "file").write_text("whole")
        assert not output.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (
        output / "file"
    ).read_text() == "whole"


def test_an_earlier_folder_stands_until_the_new_one_is_whole(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "old").write_text("old")
    with appearing_folder(output) as folder:
        (folder / "new").write_text("new")
        assert (output / "old").read_text() == "old"
    assert [path.name for path in output.iterdir()] == ["new"] and [
        path.name for path in tmp_path.iterdir()
    ] == ["out"]


def test_what_a_killed_process_left_is_removed_and_a_running_one_is_not_disturbed(
    tmp_path: Path,
) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "torn").write_text("half of a file")
    with appearing_folder(tmp_path / "out") as folder:
        assert list(folder.iterdir()) == []
        with (
            pytest.raises(ConfigError, match="another process"),
            appearing_folder(tmp_path / "out"),
        ):
            pass
    assert (tmp_path / "out").is_dir()


def test_each_new_folder_is_flushed_in_its_parent_before_the_next_one_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, str]] = []
    mkdir, fsync = Path.mkdir, os.fsync

    def made(path: Path, *given: Any, **named: Any) -> None:
        mkdir(path, *given, **named)
        calls.append(("mkdir", path.name))

    def flushed(descriptor: int) -> None:
        fsync(descriptor)
        calls.append(("fsync", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))

    monkeypatch.setattr(Path, "mkdir", made)
    monkeypatch.setattr(os, "fsync", flushed)
    expected = [
        ("mkdir", "a"),
        ("fsync", tmp_path.name),
        ("mkdir", "b"),
        ("fsync", "a"),
        ("mkdir", "c"),
        ("fsync", "b"),
    ]
    make_durable_folder(tmp_path / "a" / "b" / "c")
    assert calls == expected
    make_durable_folder(tmp_path / "a" / "b" / "c")
    assert calls == expected
    # A run's folder is made so.
    calls.clear()
    with only_writer(tmp_path / "d" / "e", "choose another folder"):
        assert calls == [("mkdir", "d"), ("fsync", tmp_path.name), ("mkdir", "e"), ("fsync", "d")]


def test_a_relative_folder_is_made_and_a_file_in_its_place_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_durable_folder(Path("a/b"))
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        make_durable_folder(Path("file/b"))


@pytest.mark.parametrize(("mask", "mode"), [("022", 0o644), ("027", 0o640), ("077", 0o600)])
def test_published_files_follow_the_umask(mask: str, mode: int, tmp_path: Path) -> None:
    program = (
        "from pathlib import Path\n"
        "from pretrain.core.files import appearing_folder, write_synced\n"
        "with appearing_folder(Path('out')) as folder:\n"
        "    write_synced(folder / 'synced', b'x')\n"
        "    (folder / 'plain').write_bytes(b'x')\n"
    )
    done = subprocess.run(
        ["sh", "-c", f'umask {mask} && exec "$0" -c "$1"', sys.executable, program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes == {"synced": mode, "plain": mode}
    assert (tmp_path / "out").stat().st_mode & 0o777 == mode | (mode & 0o444) >> 2


def test_a_full_disk_names_the_file_and_leaves_the_old_one(tmp_path: Path) -> None:
    write_synced(tmp_path / "file", b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, hard))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            write_synced(tmp_path / "file", b"new" * 1_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.filename == str(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
