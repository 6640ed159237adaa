#!/usr/bin/env python
"""Loss beyond the trained length: RoPE, ALiBi, both, and YaRN on the weights of RoPE.

Press et al. 2022, "Train Short, Test Long", in small: three runs that differ in their positions
alone, each measured at the trained length and at up to eight times as much of the same held-out
text. Runs that --runs already holds are not trained again.

Needs data/quickstart (tools/preprocess_data.py --recipe quickstart).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path

import psutil
import torch

from pretrain.checkpoint.layout import resolve_checkpoint
from pretrain.core.figures import save_figure
from pretrain.evaluation.heldout.lengths import LengthOptions, score_checkpoint_lengths
from pretrain.evaluation.heldout.lengths_plot import lengths_figure
from pretrain.evaluation.result import LengthsResult

ROOT = Path(__file__).resolve().parent.parent
TRAINED_LENGTH = 128
STEPS = 600
KINDS = ("rope", "alibi", "rope_alibi")
POSITIONS = {"rope": ("trained", "{kind: yarn, factor: 4}", "{kind: yarn, factor: 8}")}
# The quickstart's model with half of its width, layers and experts.
SETTINGS = [
    "parallel.ep_size=1",
    "model.hidden_size=128",
    "model.moe.moe_intermediate_size=256",
    "model.attention.head_dim=32",
    f"model.max_position_embeddings={TRAINED_LENGTH}",
    f"train.sequence_length={TRAINED_LENGTH}",
    "train.micro_batch_size=8",
    "model.num_hidden_layers=2",
    "model.moe.num_experts=4",
    f"train.train_tokens={STEPS * 8 * TRAINED_LENGTH}",
    "train.precision=fp32",
    f"validation.interval_steps={STEPS}",
    f"checkpoint.interval_steps={STEPS}",
]


def train(kind: str, runs: Path, data: Path) -> Path:
    """Train with one kind of positions, and return the checkpoint."""
    settings = [
        f"run_path={runs / kind}",
        f"name=lengths_{kind}",
        f"data.path={data}",
        f"model.position={{kind: {kind}}}",
        *SETTINGS,
    ]
    command = [sys.executable, str(ROOT / "launchers" / "pretrain.py"), "--recipe", "quickstart"]
    command += [word for setting in settings for word in ("--set", setting)]
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
    return resolve_checkpoint(runs / kind / "checkpoints" / "latest")


def measure(runs: Path, data: Path, lengths: list[int], max_windows: int) -> LengthsResult:
    """Train and score all kinds; the result has each as a variant."""
    found: LengthsResult | None = None
    for kind in KINDS:
        checkpoint = train(kind, runs, data)
        options = LengthOptions(
            lengths, POSITIONS.get(kind, ("trained",)), str(data), max_windows=max_windows
        )
        result = score_checkpoint_lengths(checkpoint, options, torch.device("cpu"))
        named = {
            name.replace("{kind: yarn, factor: ", "yarn, factor ").rstrip("}"): scores
            for name, scores in result["variants"].items()
        }
        if found is None:
            found = result
            found["variants"] = named
        else:
            found["variants"] |= named
    assert found is not None
    return found


def main() -> None:
    """Write the result and its plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data/quickstart"))
    parser.add_argument("--runs", type=Path, default=Path("runs/context_lengths"))
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--max-windows", type=int, default=64, help="of the longest length")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks" / "results" / "context_lengths.json"
    )
    arguments = parser.parse_args()
    result = measure(arguments.runs, arguments.data, arguments.lengths, arguments.max_windows)
    content = {
        "date": date.today().isoformat(),
        "cores": psutil.cpu_count(),
        "cpu": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "steps": STEPS,
        "settings": SETTINGS,
        **{name: value for name, value in result.items() if name != "trained_position"},
        "data": "data/quickstart",
    }
    arguments.output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    title = f"trained on {TRAINED_LENGTH} tokens, {STEPS} steps"
    save_figure(lengths_figure(result, title), arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
