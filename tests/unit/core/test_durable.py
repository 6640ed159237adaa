from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.core.errors import ConfigError
from pretrain.core.files import appearing_folder


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
