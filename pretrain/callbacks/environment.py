"""What a run was started with: environment.json with an entry for each start, and the resolved
recipe and ds_config of the newest.
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
from typing import Any

import psutil

from pretrain.callbacks.base import Callback
from pretrain.config.load import recipe_to_yaml
from pretrain.config.recipe import Recipe
from pretrain.core.credentials import is_credential_name, redact
from pretrain.core.files import write_synced

ENVIRONMENT, RECIPE, DS_CONFIG = "environment.json", "recipe.yaml", "ds_config.json"
# What decides how ranks start, find each other and compute. Any other variable may be private and
# is left out.
VARIABLES = (
    "RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "GROUP_", "ROLE_", "CROSS_", "SLURM_", "PMI_", "PMIX_RANK", "OMPI_COMM_WORLD_", "OMP_", "MKL_",
    "CUDA_", "CUBLAS_", "NVIDIA_VISIBLE_DEVICES", "HIP_", "ROCR_", "NCCL_", "GLOO_", "FI_", "UCX_", "TORCH", "PYTORCH_", "TRITON_", "DS_",
    "PYTHONHASHSEED", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "WANDB_MODE", "COMET_START_ONLINE",
)  # fmt: skip


def launch_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables of launchers and of the libraries that compute and communicate, without any whose
    name or value looks like a credential.
    """
    shown = {
        name: value
        for name, value in environment.items()
        if name.startswith(VARIABLES) and not is_credential_name(name)
    }
    return {name: redact(value) for name, value in sorted(shown.items())}


def git_state(file: Path) -> dict[str, Any] | None:
    """Commit and branch of the checkout that holds ``file``, and a hash of what differs from the
    commit.

    Where git does not track the file, only the commit that an image was built from, or None where
    that is not known either. Files that git neither tracks nor ignores count by their names and
    sizes: they may be as large as data.
    """

    def git(*arguments: str) -> bytes:
        return subprocess.run(
            ["git", "-C", str(file.parent), *arguments], check=True, capture_output=True, timeout=30
        ).stdout

    try:
        git("ls-files", "--error-unmatch", "--", file.name)
        commit, branch = (
            git("rev-parse", "HEAD").decode().strip(),
            git("rev-parse", "--abbrev-ref", "HEAD").decode().strip(),
        )
        digest, root = hashlib.sha256(), Path(git("rev-parse", "--show-toplevel").decode().strip())
        digest.update(difference := git("diff", "HEAD", "--binary", "--no-ext-diff"))
        unknown = sorted(
            git("-C", str(root), "ls-files", "--others", "--exclude-standard", "-z")
            .decode(errors="replace")
            .split("\0")[:-1]
        )
        for name in unknown:
            digest.update(f"{name}\0{(root / name).lstat().st_size}\0".encode())
    except (OSError, subprocess.SubprocessError):
        built_from = os.environ.get("IMAGE_COMMIT")  # of the Dockerfile
        return {"commit": built_from} if built_from else None
    dirty = bool(difference or unknown)
    return {
        "commit": commit,
        "branch": branch,
        "dirty": dirty,
        "diff_sha256": digest.hexdigest() if dirty else None,
        "untracked_files": len(unknown),
    }


def packages() -> dict[str, str]:
    """Every installed package and its version."""
    found = [
        distribution.metadata for distribution in metadata.distributions()
    ]  # a file is read each time that it is asked for
    return dict(
        sorted(
            ((entry["Name"], entry["Version"]) for entry in found if entry["Name"]),
            key=lambda item: item[0].lower(),
        )
    )


def hardware() -> dict[str, Any]:
    """Of this machine: processor, cores this process may use, memory in bytes, and its
    accelerators.
    """
    import torch

    gpus = (
        [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
        if torch.cuda.is_available()
        else []
    )
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [{"name": gpu.name, "memory_bytes": gpu.total_memory} for gpu in gpus],
        "cuda": torch.version.cuda,
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = (
        path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    )
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.processor() or platform.machine(),
    )


def environment_of(step: int, world_size: int) -> dict[str, Any]:
    """What this process was started with."""
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
    """Adds an entry to environment.json when training starts, and writes the recipe and the
    ds_config as they are resolved.

    The newest checkpoint of an earlier start has those of its own.
    """

    def __init__(
        self, folder: Path, recipe: Recipe, ds_config: dict[str, Any], world_size: int
    ) -> None:
        self.folder, self.recipe, self.ds_config, self.world_size = (
            folder,
            recipe,
            ds_config,
            world_size,
        )

    def on_start(self, step: int, num_steps: int) -> None:
        path = self.folder / ENVIRONMENT
        try:
            starts = json.loads(path.read_text(encoding="utf-8"))["starts"]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            starts = []
        starts.append(environment_of(step, self.world_size))
        write_synced(path, (json.dumps({"starts": starts}, indent=1) + "\n").encode())
        write_synced(self.folder / RECIPE, recipe_to_yaml(self.recipe).encode())
        write_synced(
            self.folder / DS_CONFIG, (json.dumps(self.ds_config, indent=2) + "\n").encode()
        )
