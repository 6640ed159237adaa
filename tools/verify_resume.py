#!/usr/bin/env python
# PYTHON_ARGCOMPLETE_OK
"""Proves that a checkpoint resumes at a topology, or that a run's ledger is one whole trace."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path

from pretrain.core import startup  # not found? Run `pip install -e .` in the checkout.

startup.prepare()  # before the slow imports

from rich.console import Console
from rich.table import Table

from pretrain.checkpoint.layout import resolve_checkpoint
from pretrain.checkpoint.trace import Trace, check_ledger
from pretrain.core.cli import add_json_option, add_set_option, command_parser, write_json
from pretrain.core.errors import BAD_CHECKPOINT, DONE, ConfigError, StorageError, run_command
from pretrain.engine.ds_config import read_ds_config, zero_stage_of
from pretrain.verification.job import Layout
from pretrain.verification.resume_check import Proof, Request, own_layout, prove

EXAMPLES = """\
  python tools/verify_resume.py runs/quickstart/checkpoints/latest --world-size 2 --ep-size 2
  python tools/verify_resume.py runs/quickstart/checkpoints/step_300 --world-size 4 --ep-size 2 \\
      --zero 2 --steps 3 --json -
  python tools/verify_resume.py runs/quickstart/checkpoints/latest --world-size 2 --sp-size 2
  python tools/verify_resume.py runs/quickstart/checkpoints/latest --world-size 1 \\
      --ds_config zero1_offload --set train.micro_batch_size=2
  python tools/verify_resume.py --ledger runs/quickstart
exit codes: 0 it resumes, or the trace is whole; 2 usage; 4 it does not, or a checkpoint is damaged"""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the command's options."""
    parser = command_parser(__doc__ or "", EXAMPLES)
    parser.add_argument(
        "checkpoint", nargs="?", help="a step_N folder of a training, or the file 'latest'"
    )
    parser.add_argument(
        "--ledger", metavar="RUN", help="check the ledger of a run's folder instead"
    )
    parser.add_argument("--world-size", type=int, metavar="N", help="ranks (default: as saved)")
    parser.add_argument(
        "--ep-size", type=int, metavar="N", help="ranks that share the experts (default: as saved)"
    )
    parser.add_argument(
        "--sp-size",
        type=int,
        metavar="N",
        help="ranks that share each sequence (default: as saved)",
    )
    parser.add_argument(
        "--tp-size",
        type=int,
        metavar="N",
        help="ranks that share tensors (default: as saved)",
    )
    stage = parser.add_mutually_exclusive_group()
    stage.add_argument("--zero", type=int, choices=range(4), help="ZeRO stage (default: as saved)")
    stage.add_argument(
        "--ds_config",
        "--ds-config",
        metavar="NAME|PATH",
        help="DeepSpeed's JSON for the resume (default: the checkpoint's own)",
    )
    parser.add_argument(
        "--steps", type=int, default=5, metavar="N", help="steps to compare (default: 5)"
    )
    parser.add_argument(
        "--random-tokens", action="store_true", help="take the steps on random tokens, not on data"
    )
    parser.add_argument(
        "--cpu", action="store_true", help="compute on the CPU even if there are GPUs"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="X",
        help="largest relative distance of losses and norms (default: by precision and optimizer)",
    )
    parser.add_argument(
        "--scratch",
        metavar="FOLDER",
        help="for a copy of the checkpoint, removed afterwards (default: the temporary folder)",
    )
    add_set_option(parser, "override a field of the checkpoint's recipe; may be repeated")
    add_json_option(parser)
    return parser.parse_args(arguments)


def request_of(options: argparse.Namespace) -> Request:
    """Return what the options ask to prove.

    Raises:
        ConfigError: if they cannot be.
        CheckpointError: if there is no such checkpoint.
    """
    if options.checkpoint is None:
        raise ConfigError("give a checkpoint, or --ledger RUN")
    if options.steps < 0:
        raise ConfigError(f"--steps is {options.steps}: give 0 or more")
    checkpoint = resolve_checkpoint(options.checkpoint)
    own = own_layout(checkpoint)
    for option in ("world_size", "ep_size", "sp_size", "tp_size"):
        if (value := getattr(options, option)) is not None and value < 1:
            raise ConfigError(f"--{option.replace('_', '-')} is {value}: give 1 or more")
    zero_stage = own.zero_stage if options.zero is None else options.zero
    ds_config = None
    if options.ds_config is not None:
        ds_config = read_ds_config(options.ds_config), options.ds_config
        zero_stage = zero_stage_of(*ds_config)
    asked = Layout(
        own.world_size if options.world_size is None else options.world_size,
        own.ep_size if options.ep_size is None else options.ep_size,
        zero_stage,
        own.sp_size if options.sp_size is None else options.sp_size,
        own.tp_size if options.tp_size is None else options.tp_size,
    )
    return Request(
        checkpoint=checkpoint,
        asked=asked,
        steps=options.steps,
        overrides=options.overrides,
        ds_config=ds_config,
        random_tokens=options.random_tokens,
        on_cpu=options.cpu,
        tolerance=options.tolerance,
    )


def show_proof(proof: Proof) -> None:
    """Print the steps of both topologies, and what they were taken on."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    limit = proof.tolerance
    table = Table(
        "step",
        f"loss at {proof.reference}",
        f"at {proof.asked}",
        "apart",
        "gradient norm",
        "",
        "apart",
        title=f"{proof.checkpoint}, steps on {proof.observed[1].data}, {proof.device}",
    )
    for step in proof.steps:
        table.add_row(
            str(step.step),
            *(f"{value:.7f}" for value in step.loss),
            f"{step.loss_distance:.1e}",
            *(f"{value:.6g}" for value in step.norm),
            f"{step.norm_distance:.1e}",
        )
    if proof.steps:
        console.print(table)
    print(f"reference: {proof.reference} ({proof.why})")
    if proof.steps:
        print(f"allowed distance: {limit.value:.0e} ({limit.reason})")
    for place, seen in zip((proof.reference, proof.asked), proof.observed, strict=True):
        if seen.requantized:
            print(
                f"{len(seen.requantized)} 8-bit states were quantized anew at {place}, at most "
                f"{max(seen.requantized.values()):.1e} of their largest value apart"
            )


def verify_checkpoint(options: argparse.Namespace) -> int:
    """Prove a resume; return the exit code."""
    request = request_of(options)
    try:
        scratch = Path(tempfile.mkdtemp(prefix="verify_resume_", dir=options.scratch))
    except OSError as error:
        raise StorageError(
            f"cannot make a folder in {options.scratch or tempfile.gettempdir()}: "
            f"{error.strerror}; choose another --scratch"
        ) from None
    try:
        proof = prove(request, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    write_json(proof.to_dict(), options.json_path)
    faults = proof.faults
    if options.json_path != "-":
        show_proof(proof)
        if not faults:
            print(
                f"{proof.checkpoint} resumes at {proof.asked}: all {proof.tensors} tensors are as "
                f"saved, and {len(proof.steps)} steps are the same"
            )
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    return BAD_CHECKPOINT if faults else DONE


def show_trace(trace: Trace) -> None:
    """Print a line for each segment of a run, and the verdict."""
    for segment in trace.segments:
        print(segment)
    for note in trace.notes:
        print(f"note: {note}")
    if not trace.faults:
        print(trace.verdict)


def verify_ledger(options: argparse.Namespace) -> int:
    """Check a run's ledger; return the exit code."""
    if options.checkpoint is not None:
        raise ConfigError("give a checkpoint or --ledger RUN, not both")
    trace = check_ledger(Path(options.ledger))
    write_json(trace.to_dict(), options.json_path)
    if options.json_path != "-":
        show_trace(trace)
    for fault in trace.faults:
        print(f"error: {fault}", file=sys.stderr)
    return BAD_CHECKPOINT if trace.faults else DONE


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return the exit code."""
    options = parse_arguments(arguments)
    return verify_checkpoint(options) if options.ledger is None else verify_ledger(options)


command = partial(run_command, main)  # moe-verify-resume

if __name__ == "__main__":
    command()
