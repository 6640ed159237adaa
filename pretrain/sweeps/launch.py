"""One run of a sweep as a command: the launcher that a user starts, below a supervisor.

The supervisor ends the run if the sweep dies.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from pretrain.core.errors import ConfigError
from pretrain.core.launch import training_environment
from pretrain.core.plugins import plugin_arguments
from pretrain.core.shipped import LAUNCHERS, shown
from pretrain.sweeps.axes import Point
from pretrain.sweeps.study import DS_CONFIG, RunResult, Study

TAIL_BYTES = 1 << 14
# The sentence that a run ends with; an unfinished progress bar may come before it on the line.
ERROR = re.compile(r"(?:^|\])error: (.+)$")


def visible_gpus() -> list[str]:
    """The GPUs that runs are spread over: those of CUDA_VISIBLE_DEVICES, or all of the machine."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        # "-1" hides all GPUs.
        return [name for name in visible.split(",") if name and not name.startswith("-")]
    # Asked of the driver: this process needs torch for nothing else.
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    listed = subprocess.run(
        [tool, "--list-gpus"], capture_output=True, text=True, check=False
    ).stdout
    return [
        str(number)
        for number in range(sum(line.startswith("GPU ") for line in listed.splitlines()))
    ]


def slot_devices(gpus: Sequence[str], slots: int | None, ranks: int) -> list[list[str]]:
    """The GPUs of each slot, one for each rank; empty lists on CPUs.

    Args:
        slots: runs at once; by default what the GPUs allow, and one on CPUs.

    Raises:
        ConfigError: if there are too few GPUs.
    """
    if not gpus:
        return [[] for _ in range(slots or 1)]
    count = slots or max(1, len(gpus) // ranks)
    if count * ranks > len(gpus):
        raise ConfigError(
            f"{count} runs of {ranks} ranks at once need {count * ranks} GPUs, but there are"
            f" {len(gpus)}: lower --slots or --ranks"
        )
    return [list(gpus[index * ranks : (index + 1) * ranks]) for index in range(count)]


def continuing_command(options: argparse.Namespace, tool: Path) -> list[str]:
    """The command that continues a sweep, with the options that its folder does not keep."""
    command = [shown(tool), "--output", str(options.output), *plugin_arguments()]
    if options.slots is not None:
        command += ["--slots", str(options.slots)]
    if not options.keep_going:
        command.append("--no-keep-going")
    if options.retry_failed:
        command.append("--retry-failed")
    if options.json_path is not None:
        command += ["--json", options.json_path]
    return command


def launch_command(study: Study, point: Point, devices: Sequence[str]) -> list[str]:
    """The command line of a run: Python for one rank, the deepspeed launcher for more ranks."""
    settings = [*point.overrides, f"run_path={study.run_folder(point.run)}"]
    training = [
        str(LAUNCHERS / "pretrain.py"),
        "--recipe",
        str(study.base_recipe),
        "--ds_config",
        str(study.output / DS_CONFIG),
    ]
    training += [part for setting in settings for part in ("--set", setting)]
    training += [*plugin_arguments(), "--json", str(result_path(study, point))]
    ranks = study.design.ranks
    if ranks == 1:
        launcher = [sys.executable]
    else:
        # The deepspeed launcher overrides CUDA_VISIBLE_DEVICES: it needs the devices as an option.
        placement = (
            ["--include", f"localhost:{','.join(devices)}"]
            if devices
            else ["--num_accelerators", str(ranks)]
        )
        deepspeed = [sys.executable, str(LAUNCHERS / "deepspeed_launcher.py")]
        launcher = [*deepspeed, *placement, "--master_port", str(_free_port())]
    return [
        sys.executable,
        str(LAUNCHERS / "supervise.py"),
        "--parent",
        str(os.getpid()),
        *launcher,
        *training,
    ]


def launch_environment(slots: int, ranks: int, devices: Sequence[str]) -> dict[str, str]:
    """The environment of a run: its GPUs, and its share of the cores."""
    environment = training_environment()
    environment.setdefault(
        "OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // (slots * ranks)))
    )
    if devices and ranks == 1:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    return environment


def _free_port() -> int:
    # Runs at the same time need different ports, and the launcher's default is always 29500.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def result_path(study: Study, point: Point) -> Path:
    """The JSON that a run writes when it ends."""
    return study.point_folder(point.run) / "result.json"


def output_path(study: Study, point: Point) -> Path:
    """What all attempts of a run have printed."""
    return study.point_folder(point.run) / "output.txt"


def read_result(study: Study, point: Point) -> RunResult | None:
    """The result of a run that has taken all its steps, or that a guard ended early.

    None if there is no such result, or its file is torn.
    """
    try:
        content = json.loads(result_path(study, point).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    result = cast(RunResult, content)
    done = result["stopped_early"] or result["steps"] >= study.num_steps(point)
    return result if done else None


def error_sentence(printed: str, code: int) -> str:
    """Why a run failed: the sentence it printed, or its exit code and its last line."""
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    sentences = [match[1] for line in lines if (match := ERROR.search(line))]
    if sentences:
        return sentences[-1]
    return f"ended with exit code {code}: {lines[-1] if lines else 'it printed nothing'}"


def metrics(run: Path, last_bytes: int | None = None) -> list[dict[str, str]]:
    """The records of a run's training_log.csv; a torn last line is left out.

    Args:
        last_bytes: read only the records in this many bytes at the end of the file.
    """
    path = run / "training_log.csv"
    if not path.is_file():
        return []
    with path.open("rb") as file:
        columns = file.readline().decode().rstrip("\r\n").split(",")
        size = os.fstat(file.fileno()).st_size
        cut = last_bytes is not None and size - last_bytes > file.tell()
        if cut and last_bytes is not None:
            file.seek(size - last_bytes)  # may land inside a line, which is dropped below
        lines = file.read().decode(errors="replace").splitlines(keepends=True)
    return list(
        csv.DictReader([line for line in lines[1 if cut else 0 :] if line.endswith("\n")], columns)
    )


def reached_step(run: Path) -> int:
    """The step of the newest record, 0 if there is none."""
    records = metrics(run, TAIL_BYTES)
    return int(records[-1]["step"]) if records else 0


def validations(run: Path) -> list[tuple[int, float]]:
    """The validation losses by step."""
    return [
        (int(record["step"]), float(record["validation_loss"]))
        for record in metrics(run)
        if record["kind"] == "validation"
    ]
