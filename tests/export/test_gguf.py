from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pretrain.config.errors import BAD_CHECKPOINT, USAGE
from pretrain.export.gguf import SCRIPT
from tests.export.tiny_checkpoint import Trained

TOOL = Path(__file__).resolve().parents[2] / "tools" / "convert_checkpoint.py"


def to_gguf(trained: Trained, output: Path, path: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), "--checkpoint", str(trained.latest), "--to", "gguf", "--output", str(output)]
    return subprocess.run(command, capture_output=True, text=True, env={"PATH": path, "OMP_NUM_THREADS": "1"})


def test_without_llama_cpp_one_sentence_says_what_to_do(trained: Trained, tmp_path: Path) -> None:
    refused = to_gguf(trained, tmp_path / "out", str(tmp_path))
    assert refused.returncode == USAGE and "--to hf" in refused.stderr and SCRIPT in refused.stderr and "Traceback" not in refused.stderr
    assert not (tmp_path / "out").exists()


def test_a_converter_that_fails_is_quoted_and_nothing_is_published(trained: Trained, tmp_path: Path) -> None:
    script = tmp_path / SCRIPT
    script.write_text("raise SystemExit('this model is not known')")
    script.chmod(0o755)
    refused = to_gguf(trained, tmp_path / "out", str(tmp_path))
    assert refused.returncode == BAD_CHECKPOINT and "this model is not known" in refused.stderr and "Traceback" not in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == [SCRIPT]
