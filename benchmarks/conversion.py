#!/usr/bin/env python
"""Conversion of a checkpoint with 2 GB of fp32 weights: ours against DeepSpeed's own tools.

Those are ``zero_to_fp32`` and ``ds_to_universal``, and read what DeepSpeed's engine saved of the
same model. Both checkpoints are real ones, of one rank at ZeRO stage 1 in bf16. Each measurement is
a separate process; its peak is held memory (benchmarks/held_memory.py), with the interpreter and
all imports. Ours is without the comparison of logits, which needs both models in memory, and with
the comparison of every tensor with its source. ``zero_to_fp32`` refuses mixtures of experts, so a
dense model of about as many parameters is measured as well.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from held_memory import MEASURE, PeakMemory
from rich.console import Console
from rich.table import Table

from pretrain.checkpoint.weights import open_weights

ROOT = Path(__file__).resolve().parent.parent
SIDES = {
    "ours, safetensors, fp32": (
        "from pretrain.export.convert import export_safetensors; export_safetensors(source, output,"
        " torch.float32, overwrite=False)"
    ),
    "ours, safetensors, bf16": (
        "from pretrain.export.convert import export_safetensors; export_safetensors(source, output,"
        " torch.bfloat16, overwrite=False)"
    ),
    "ours, hf, bf16": (
        "from pretrain.export.convert import export_hf; from data_pipeline.shards.token_stream"
        " import open_split; from data_pipeline.shards.manifest import load_manifest; stream ="
        " open_split(load_manifest(data), 'train'); export_hf(source, output, stream,"
        " torch.bfloat16, overwrite=False, memory_bytes=0)"
    ),
    "deepspeed, zero_to_fp32": (
        "from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict as"
        " convert; convert(str(theirs), str(output), safe_serialization=True, tag='saved')"
    ),
    "deepspeed, ds_to_universal": (
        "from argparse import Namespace; from deepspeed.checkpoint import ds_to_universal;"
        " ds_to_universal.main(Namespace(input_folder=str(theirs / 'saved'),"
        " output_folder=str(output), num_extract_workers=1, num_merge_workers=1,"
        " keep_temp_folder=False, strict=True, inject_missing_state=False))"
    ),
}
# Run by ``python -c``: imports are not timed, the side is.
PROGRAM = """
import sys, time, torch
from pathlib import Path
source, theirs, output, data = map(Path, sys.argv[1:])
started = time.perf_counter()
{side}
print("MEASURED", time.perf_counter() - started)
"""
SAVE_BY_DEEPSPEED = """
import sys
from checkpoints import trained_engine
engine, _ = trained_engine(sys.argv[2:], "bf16")
engine.deepspeed.save_checkpoint(sys.argv[1], tag="saved")
"""
COMMON = [
    "train.sequence_length=32",
    "train.micro_batch_size=1",
    "train.global_batch_size=1",
    "train.train_tokens=32",
    "train.precision=bf16",
    "validation.max_windows=1",
]
MODELS = {
    # 16 layers of 16 experts: 2 GB in fp32, the largest tensor 42 MB.
    "mixture of experts": [
        "model.hidden_size=480",
        "model.num_hidden_layers=16",
        "model.attention.head_dim=120",
        "model.moe.num_experts=16",
        "model.moe.moe_intermediate_size=1360",
    ],
    "dense": [
        "model.hidden_size=1024",
        "model.num_hidden_layers=16",
        "model.attention.head_dim=256",
        "model.layer_pattern.kind=all_dense",
        "model.intermediate_size=8960",
    ],
}


def train_one_step(folder: Path, name: str, overrides: list[str]) -> Path:
    """The folder of a real checkpoint, written by the training command itself."""
    run = folder / name.replace(" ", "_")
    settings = [
        f"data.path={folder / 'data'}",
        f"run_path={run}",
        "schedule.warmup_steps=0",
        *COMMON,
        *overrides,
    ]
    # A single step: the size of the files is all that matters.
    command = [sys.executable, str(ROOT / "launchers" / "pretrain.py"), "--recipe", "debug"]
    subprocess.run(
        [*command, *(part for setting in settings for part in ("--set", setting))],
        check=True,
        cwd=folder,
        stdout=subprocess.DEVNULL,
    )
    return run / "checkpoints" / "step_1"


def save_by_deepspeed(folder: Path, overrides: list[str]) -> Path:
    """The folder of a checkpoint of the same model that DeepSpeed's engine wrote."""
    output = folder / "deepspeed"
    subprocess.run(
        [sys.executable, "-c", SAVE_BY_DEEPSPEED, str(output), *COMMON, *overrides],
        check=True,
        cwd=Path(__file__).parent,
        stdout=subprocess.DEVNULL,
    )
    return output


def measure(side: str, source: Path, theirs: Path, folder: Path) -> tuple[float, int] | str:
    """Seconds and the peak of held bytes, or the error's last line."""
    output = folder / "output"
    shutil.rmtree(output, ignore_errors=True)
    command = [
        sys.executable,
        "-c",
        PROGRAM.format(side=SIDES[side]),
        str(source),
        str(theirs),
        str(output),
        str(folder / "data"),
    ]
    environment = dict(os.environ)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    # Sampled from outside, so that DeepSpeed's tools need no change.
    with PeakMemory(process.pid) as memory:
        printed, errors = process.communicate()
    shutil.rmtree(output, ignore_errors=True)
    if process.returncode:
        return errors.strip().splitlines()[-1].replace(str(folder), "...")[:200]
    return float(printed.split("MEASURED")[1]), memory.peak


def main() -> None:
    """Train both models, convert them by every side, print tables and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks" / "results" / "conversion.json"
    )
    parser.add_argument(
        "--folder", type=Path, help="where 15 GB have room; a temporary folder by default"
    )
    arguments = parser.parse_args()
    result: dict[str, object] = {
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} x {platform.machine()}, Python {platform.python_version()}",
        "memory": MEASURE,
        "models": {},
    }
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary)
        preprocess = [
            sys.executable,
            str(ROOT / "tools" / "preprocess_data.py"),
            "--input",
            str(ROOT / "pretrain" / "**" / "*.py"),
        ]
        subprocess.run(
            [*preprocess, "--output", str(folder / "data")], check=True, stdout=subprocess.DEVNULL
        )
        models: dict[str, object] = {}
        for name, overrides in MODELS.items():
            source = train_one_step(folder, name, overrides)
            theirs = save_by_deepspeed(folder, overrides)
            weights = open_weights(source)
            # Read from headers: no tensor is loaded here.
            sizes = [weights.form(tensor).bytes for tensor in weights.names]
            table = Table(
                "side",
                "seconds",
                "peak MB",
                title=(
                    f"{name}: {sum(sizes) / 1e9:.2f} GB of fp32, largest tensor"
                    f" {max(sizes) / 1e6:.0f} MB"
                ),
            )
            sides: dict[str, object] = {}
            for side in SIDES:
                # No dense architecture of Hugging Face has the debug recipe's qk-norm.
                if name == "dense" and side == "ours, hf, bf16":
                    continue
                time.sleep(1)
                measured = measure(side, source, theirs, folder)
                if isinstance(measured, str):
                    sides[side] = {"fails": measured}
                    table.add_row(side, measured)
                else:
                    sides[side] = {"seconds": measured[0], "peak_bytes": measured[1]}
                    table.add_row(side, f"{measured[0]:.1f}", f"{measured[1] / 1e6:.0f}")
            models[name] = {
                "weights_bytes": sum(sizes),
                "largest_tensor_bytes": max(sizes),
                "sides": sides,
            }
            shutil.rmtree(source.parent.parent)
            shutil.rmtree(theirs)
            Console().print(table)
    result["models"] = models
    arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
