"""Writes GGUF with llama.cpp's converter, from a Hugging Face export."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from data_pipeline.shards.token_stream import TokenStream
from pretrain.core.errors import CheckpointError, ConfigError
from pretrain.export.convert import Conversion, export_hf
from pretrain.export.writer import RECORD, published_folder, write_json_file

SCRIPT = "convert_hf_to_gguf.py"
GGUF_FILE = "model.gguf"
OUT_TYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}


def find_converter() -> Path:
    """llama.cpp's script on the PATH.

    Raises:
        ConfigError: if it is not there: no package on PyPI installs it as a wheel.
    """
    found = shutil.which(SCRIPT)
    if found is None:
        raise ConfigError(
            f"there is no {SCRIPT} on the PATH: put llama.cpp's folder there (chmod +x {SCRIPT};"
            f" pip install gguf), or convert with --to hf and run llama.cpp's {SCRIPT} on the"
            " result"
        )
    return Path(found)


def export_gguf(
    checkpoint: Path, output: Path, heldout: TokenStream, dtype: torch.dtype, overwrite: bool
) -> Conversion:
    """Writes ``model.gguf`` and a record, after comparing logits as :func:`export_hf` does.

    Raises:
        ConfigError: without llama.cpp's converter, or as :func:`export_hf`.
        CheckpointError: if the converter does not take the export, with its own last words.
    """
    converter = find_converter()
    with published_folder(output, overwrite) as folder:
        # Inside of the folder that is published, so that it is removed with it after an error.
        between = folder / "hf"
        conversion = export_hf(checkpoint, between, heldout, dtype, overwrite=False)
        file = folder / GGUF_FILE
        command = [
            sys.executable,
            str(converter),
            str(between),
            "--outfile",
            str(file),
            "--outtype",
            OUT_TYPES[dtype],
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not file.is_file():
            # The last line of a Python traceback names the error.
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise CheckpointError(
                f"llama.cpp's {SCRIPT} does not take the export ({last[:300]}): nothing was"
                " published; use --to hf"
            )
        shutil.rmtree(between)
        conversion = replace(
            conversion, target=f"gguf of {conversion.target}", bytes=file.stat().st_size
        )
        write_json_file(folder / RECORD, conversion.to_dict())
    return conversion
