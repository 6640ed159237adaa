"""What a run was started with.

environment.json has an entry for each start; recipe.yaml and ds_config.json are the resolved ones
of the newest start.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import NotRequired, TypedDict

import psutil

from pretrain.callbacks.base import Callback
from pretrain.config.load import recipe_to_yaml
from pretrain.config.recipe import Recipe
from pretrain.core.credentials import is_credential_name, redact
from pretrain.core.files import JsonObject, write_synced

ENVIRONMENT = "environment.json"
RECIPE = "recipe.yaml"
DS_CONFIG = "ds_config.json"
# What decides how ranks start, find each other and compute: names, or how they begin. Any other
# variable may be private and is left out.
VARIABLES = (
    # launchers
    "RANK",
    "LOCAL_",
    "WORLD_SIZE",
    "MASTER_",
    "GROUP_",
    "ROLE_",
    "CROSS_",
    "SLURM_",
    "PMI_",
    "PMIX_RANK",
    "OMPI_COMM_WORLD_",
    # computation
    "OMP_",
    "MKL_",
    "CUDA_",
    "CUBLAS_",
    "NVIDIA_VISIBLE_DEVICES",
    "HIP_",
    "ROCR_",
    "TORCH",
    "PYTORCH_",
    "TRITON_",
    "DS_",
    "PYTHONHASHSEED",
    # communication
    "NCCL_",
    "GLOO_",
    "FI_",
    "UCX_",
    # whether services are reached
    "HF_HUB_OFFLINE",
    "HF_DATASETS_OFFLINE",
    "WANDB_MODE",
    "COMET_START_ONLINE",
)
GIT_SECONDS = 30


class GitState(TypedDict):
    """The code of a start.

    Attributes:
        dirty: whether the working tree differs from the commit.
        diff_sha256: of that difference; None if there is none.
        untracked_files: that git does not ignore.
    """

    commit: str
    branch: NotRequired[str]
    dirty: NotRequired[bool]
    diff_sha256: NotRequired[str | None]
    untracked_files: NotRequired[int]


class Gpu(TypedDict):
    """One accelerator."""

    name: str
    memory_bytes: int


class Hardware(TypedDict):
    """This machine; ``cores`` are those that this process may use."""

    processor: str
    cores: int
    memory_bytes: int
    gpus: list[Gpu]
    cuda: str | None


class Start(TypedDict):
    """An entry of environment.json.

    Attributes:
        time: in UTC, ISO 8601.
        after_step: the steps that were done before.
        command: without credentials, as ``variables`` is too.
        folder: the working directory.
    """

    time: str
    after_step: int
    world_size: int
    command: list[str]
    folder: str
    python: str
    system: str
    git: GitState | None
    hardware: Hardware
    variables: dict[str, str]
    packages: dict[str, str]


def launch_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of launchers and of libraries that compute and communicate.

    Those whose name looks like a credential are left out, and such values are redacted.
    """
    shown = {
        name: value
        for name, value in environment.items()
        if name.startswith(VARIABLES) and not is_credential_name(name)
    }
    return {name: redact(value) for name, value in sorted(shown.items())}


def git_state(file: Path) -> GitState | None:
    """Return commit and branch of the checkout that holds ``file``, and a hash of its changes.

    If git does not track the file, only the commit that an image was built from, or None if that is
    not known either. Files that git neither tracks nor ignores count by their names and sizes: they
    may be as large as data.
    """

    def git(*arguments: str) -> bytes:
        command = ["git", "-C", str(file.parent), *arguments]
        return subprocess.run(command, check=True, capture_output=True, timeout=GIT_SECONDS).stdout

    try:
        # Fails for a file that git does not track, such as a package inside another checkout.
        git("ls-files", "--error-unmatch", "--", file.name)
        commit = git("rev-parse", "HEAD").decode().strip()
        branch = git("rev-parse", "--abbrev-ref", "HEAD").decode().strip()
        root = Path(git("rev-parse", "--show-toplevel").decode().strip())
        difference = git("diff", "HEAD", "--binary", "--no-ext-diff")
        listing = git("-C", str(root), "ls-files", "--others", "--exclude-standard", "-z")
        untracked = sorted(listing.decode(errors="replace").split("\0")[:-1])
        digest = hashlib.sha256(difference)
        for name in untracked:
            digest.update(f"{name}\0{(root / name).lstat().st_size}\0".encode())
    except (OSError, subprocess.SubprocessError):
        built_from = os.environ.get("IMAGE_COMMIT")  # of the Dockerfile
        return {"commit": built_from} if built_from else None
    dirty = bool(difference or untracked)
    return {
        "commit": commit,
        "branch": branch,
        "dirty": dirty,
        "diff_sha256": digest.hexdigest() if dirty else None,
        "untracked_files": len(untracked),
    }


def packages() -> dict[str, str]:
    """Return every installed package and its version."""
    # `metadata` reads a file each time that it is asked for: ask once.
    found = [distribution.metadata for distribution in metadata.distributions()]
    versions = [(entry["Name"], entry["Version"]) for entry in found if entry["Name"]]
    return dict(sorted(versions, key=lambda item: item[0].lower()))


def hardware() -> Hardware:
    """Describe this machine."""
    import torch

    gpus = []
    if torch.cuda.is_available():
        gpus = [
            torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())
        ]
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [{"name": gpu.name, "memory_bytes": gpu.total_memory} for gpu in gpus],
        "cuda": torch.version.cuda,
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def environment_of(step: int, world_size: int) -> Start:
    """Describe what this process was started with, after ``step`` steps."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "after_step": step,
        "world_size": world_size,
        "command": [redact(part) for part in sys.argv],
        "folder": os.getcwd(),
        "python": sys.version.split()[0],
        "system": platform.platform(),
        "git": git_state(Path(__file__).resolve()),
        "hardware": hardware(),
        "variables": launch_variables(os.environ),
        "packages": packages(),
    }


class RunRecord(Callback):
    """Adds an entry to environment.json when training starts.

    It also writes the recipe and the ds_config as they are resolved. Those of an earlier start are
    in its newest checkpoint.
    """

    def __init__(
        self, folder: Path, recipe: Recipe, ds_config: JsonObject, world_size: int
    ) -> None:
        self.folder = folder
        self.recipe = recipe
        self.ds_config = ds_config
        self.world_size = world_size

    def on_start(self, step: int, num_steps: int) -> None:
        """Write the three files."""
        path = self.folder / ENVIRONMENT
        try:
            starts = json.loads(path.read_text(encoding="utf-8"))["starts"]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            starts = []
        # Every start stays, because a run may be resumed by another version of the code.
        starts.append(environment_of(step, self.world_size))
        write_synced(path, (json.dumps({"starts": starts}, indent=1) + "\n").encode())
        write_synced(self.folder / RECIPE, recipe_to_yaml(self.recipe).encode())
        ds_config = json.dumps(self.ds_config, indent=2) + "\n"
        write_synced(self.folder / DS_CONFIG, ds_config.encode())
