#!/usr/bin/env python
"""Needles and loss up to 2,048 tokens: trained on 256, and extended in three ways.

The recipe long_context trains on 256 tokens, then on 2,048 with a larger base of the rotary
embedding. Two more runs branch off from the end of its first phase: one keeps the base, one has
YaRN. Every checkpoint is asked for the same needles, and scored on the same held-out text. What a
run folder or the data folder already holds is not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import torch

from pretrain.checkpoint.layout import resolve_checkpoint
from pretrain.config.load import load_recipe
from pretrain.core.figures import save_figure
from pretrain.evaluation.heldout.lengths import LengthOptions, score_checkpoint_lengths
from pretrain.evaluation.needle.score import NeedleOptions, score_checkpoint_needles
from pretrain.evaluation.plot import evaluation_figure
from pretrain.evaluation.result import EvaluationResult

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "long_context.json"
TEXTS, DATA = Path("data/long_context_texts"), Path("data/long_context")
LENGTHS = (128, 256, 512, 1024, 2048)
YARN = "{kind: yarn, factor: 8, original_max_position_embeddings: 256, rope_theta: 10000}"
# Runs that branch off after the first phase, and their positions in the second one.
BRANCHES = {"same base": "{kind: rope, rope_theta: 10000}", "YaRN": YARN}
CPU = torch.device("cpu")


def run(*command: str | Path) -> float:
    """Run a command of the project; return its wall seconds."""
    started = time.perf_counter()
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)
    return time.perf_counter() - started


def pretrain(folder: Path, *settings: str) -> float:
    """Train or resume a run of the recipe; return the wall seconds."""
    words = [f"--set={setting}" for setting in (f"run_path={folder}", *settings)]
    return run("launchers/pretrain.py", "--recipe", "long_context", *words)


def checkpoints(runs: Path) -> tuple[dict[str, tuple[Path, str]], dict[str, float]]:
    """Train all runs; return each variant's checkpoint and positions, and seconds by command."""
    seconds = {
        "corpus": run("tools/make_needle_corpus.py", "--output", TEXTS),
        "shards": run("tools/preprocess_data.py", "--recipe", "long_context"),
        "training, base 80,000": pretrain(runs / "base"),
    }
    last = resolve_checkpoint(runs / "base" / "checkpoints" / "latest")
    recipe = load_recipe("long_context", [])
    tokens = recipe.phases[0].tokens
    assert tokens is not None
    steps = tokens // recipe.train.tokens_per_step
    first = last.parent / f"step_{steps}"
    found = {
        "256 tokens only": (first, "trained"),
        "256 tokens only, then YaRN": (first, YARN),
    }
    for name, position in BRANCHES.items():
        folder = runs / name.replace(" ", "_").lower()
        seconds[f"second phase, {name}"] = pretrain(
            folder, f"branch_from={first}", f"phases.1.position={position}"
        )
        found[f"+ 2,048, {name}"] = (
            resolve_checkpoint(folder / "checkpoints" / "latest"),
            "trained",
        )
    found["+ 2,048, base 80,000"] = (last, "trained")
    return found, seconds


def measure(found: dict[str, tuple[Path, str]], samples: int) -> EvaluationResult:
    """Needles and losses of all variants, as one result of tools/evaluate.py."""
    merged: EvaluationResult = {"checkpoint": "long_context"}
    for name, (checkpoint, position) in found.items():
        needles = score_checkpoint_needles(
            checkpoint,
            NeedleOptions(LENGTHS, samples=samples, form="pairs", positions=(position,)),
            CPU,
        )
        lengths = score_checkpoint_lengths(
            checkpoint, LengthOptions(LENGTHS, (position,), max_windows=samples), CPU
        )
        (needles["variants"][name],) = list(needles["variants"].values())
        (lengths["variants"][name],) = list(lengths["variants"].values())
        needles["variants"] = {name: needles["variants"][name]}
        lengths["variants"] = {name: lengths["variants"][name]}
        if "needles" in merged:
            merged["needles"]["variants"] |= needles["variants"]
            merged["lengths"]["variants"] |= lengths["variants"]
        else:
            merged["needles"], merged["lengths"] = needles, lengths
    return merged


def main() -> None:
    """Write the result and its plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/long_context"))
    parser.add_argument("--samples", type=int, default=40, help="needles a cell, and windows")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--redraw", action="store_true", help="draw --output again, and no more")
    arguments = parser.parse_args()
    if not arguments.redraw:
        found, seconds = checkpoints(arguments.runs)
        content: dict[str, Any] = {
            "date": date.today().isoformat(),
            "cores": len(os.sched_getaffinity(0)),
            "load": psutil.getloadavg()[1],
            "cpu": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "seconds": seconds,
            **measure(found, arguments.samples),
        }
        arguments.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    stored: EvaluationResult = json.loads(arguments.output.read_text("utf-8"))
    figure = evaluation_figure(stored, "")
    save_figure(figure, arguments.output.with_suffix(".png"), dpi=75)


if __name__ == "__main__":
    main()
