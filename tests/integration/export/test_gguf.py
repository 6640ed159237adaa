from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data_pipeline.shards.token_stream import open_split
from pretrain.core.errors import CheckpointError, ConfigError
from pretrain.export.gguf import SCRIPT, export_gguf
from tests.support.tiny_checkpoint import Trained


def to_gguf(trained: Trained, output: Path) -> None:
    export_gguf(
        trained.checkpoint,
        output,
        open_split(trained.manifest, "validation"),
        torch.float32,
        overwrite=False,
    )


def test_without_llama_cpp_one_sentence_says_what_to_do(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=f"no {SCRIPT} on the PATH: .*--to hf"):
        to_gguf(trained, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_converter_that_fails_is_quoted_and_nothing_is_published(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / SCRIPT
    script.write_text("raise SystemExit('this model is not known')")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CheckpointError, match="this model is not known"):
        to_gguf(trained, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [SCRIPT]
