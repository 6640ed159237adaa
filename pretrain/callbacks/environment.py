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
from pretrain.core.credentials import redact
from pretrain.core.files import JsonObject, write_synced

ENVIRONMENT = "environment.json"
RECIPE = "recipe.yaml"
DS_CONFIG = "ds_config.json"
# What decides how ranks start, find each other and compute, by exact names: any other variable may
# be private, whatever it begins with.
VARIABLES = frozenset(
    (
        # launchers
        "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE LOCAL_SIZE GROUP_RANK GROUP_WORLD_SIZE "
        "ROLE_RANK ROLE_WORLD_SIZE ROLE_NAME CROSS_RANK CROSS_SIZE MASTER_ADDR MASTER_PORT "
        "TORCHELASTIC_RESTART_COUNT TORCHELASTIC_MAX_RESTARTS TORCHELASTIC_RUN_ID PMI_RANK "
        "PMI_SIZE PMIX_RANK OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_SIZE "
        "OMPI_COMM_WORLD_LOCAL_RANK OMPI_COMM_WORLD_LOCAL_SIZE SLURM_JOB_ID SLURM_JOB_NAME "
        "SLURM_JOB_NODELIST SLURM_JOB_NUM_NODES SLURM_JOB_PARTITION SLURM_ARRAY_JOB_ID "
        "SLURM_ARRAY_TASK_ID SLURM_CLUSTER_NAME SLURM_CPUS_PER_TASK SLURM_CPUS_ON_NODE "
        "SLURM_GPUS_ON_NODE SLURM_GPUS_PER_NODE SLURM_LOCALID SLURM_NNODES SLURM_NODEID "
        "SLURM_NODELIST SLURM_NTASKS SLURM_NTASKS_PER_NODE SLURM_PROCID SLURM_RESTART_COUNT "
        "SLURM_STEP_ID SLURM_STEP_NUM_TASKS SLURM_MEM_PER_NODE "
        # computation
        "OMP_NUM_THREADS OMP_PROC_BIND OMP_PLACES OMP_WAIT_POLICY KMP_AFFINITY KMP_BLOCKTIME "
        "MKL_NUM_THREADS MKL_CBWR MKL_ENABLE_INSTRUCTIONS OPENBLAS_NUM_THREADS "
        "CUDA_VISIBLE_DEVICES CUDA_DEVICE_ORDER CUDA_DEVICE_MAX_CONNECTIONS "
        "CUDA_LAUNCH_BLOCKING CUDA_MODULE_LOADING CUDA_HOME CUDA_VERSION "
        "CUBLAS_WORKSPACE_CONFIG NVIDIA_TF32_OVERRIDE NVIDIA_VISIBLE_DEVICES "
        "NVIDIA_DRIVER_CAPABILITIES HIP_VISIBLE_DEVICES ROCR_VISIBLE_DEVICES "
        "PYTORCH_ALLOC_CONF PYTORCH_CUDA_ALLOC_CONF PYTORCH_HIP_ALLOC_CONF "
        "TORCH_CUDA_ARCH_LIST TORCH_LOGS TORCH_SHOW_CPP_STACKTRACES "
        "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE TORCH_EXTENSIONS_DIR TORCHINDUCTOR_CACHE_DIR "
        "TORCHINDUCTOR_COMPILE_THREADS TORCH_COMPILE_DISABLE TORCHDYNAMO_DISABLE "
        "TRITON_CACHE_DIR TRITON_INTERPRET DS_ACCELERATOR DS_SKIP_CUDA_CHECK PYTHONHASHSEED "
        "FAULT "
        # communication
        "NCCL_ALGO NCCL_ASYNC_ERROR_HANDLING NCCL_BLOCKING_WAIT NCCL_BUFFSIZE "
        "NCCL_COLLNET_ENABLE NCCL_CROSS_NIC NCCL_CUMEM_ENABLE NCCL_DEBUG NCCL_DEBUG_FILE "
        "NCCL_DEBUG_SUBSYS NCCL_DMABUF_ENABLE NCCL_IB_CUDA_SUPPORT NCCL_IB_DISABLE "
        "NCCL_IB_GID_INDEX NCCL_IB_HCA NCCL_IB_PCI_RELAXED_ORDERING "
        "NCCL_IB_QPS_PER_CONNECTION NCCL_IB_RETRY_CNT NCCL_IB_SL NCCL_IB_TC NCCL_IB_TIMEOUT "
        "NCCL_LAUNCH_MODE NCCL_MAX_CTAS NCCL_MAX_NCHANNELS NCCL_MIN_CTAS NCCL_MIN_NCHANNELS "
        "NCCL_NET NCCL_NET_GDR_LEVEL NCCL_NET_GDR_READ NCCL_NET_PLUGIN NCCL_NSOCKS_PERTHREAD "
        "NCCL_NTHREADS NCCL_NVLS_ENABLE NCCL_P2P_DISABLE NCCL_P2P_LEVEL "
        "NCCL_P2P_NET_CHUNKSIZE NCCL_PROTO NCCL_PXN_DISABLE NCCL_SHM_DISABLE "
        "NCCL_SOCKET_FAMILY NCCL_SOCKET_IFNAME NCCL_SOCKET_NTHREADS NCCL_TOPO_FILE "
        "NCCL_TREE_THRESHOLD NCCL_TUNER_PLUGIN TORCH_NCCL_ASYNC_ERROR_HANDLING "
        "TORCH_NCCL_BLOCKING_WAIT TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC "
        "TORCH_NCCL_AVOID_RECORD_STREAMS TORCH_NCCL_HIGH_PRIORITY "
        "TORCH_NCCL_TRACE_BUFFER_SIZE TORCH_NCCL_DUMP_ON_TIMEOUT TORCH_DISTRIBUTED_DEBUG "
        "GLOO_SOCKET_IFNAME TP_SOCKET_IFNAME FI_PROVIDER FI_EFA_USE_DEVICE_RDMA "
        "FI_EFA_FORK_SAFE UCX_NET_DEVICES UCX_TLS UCX_IB_GPU_DIRECT_RDMA "
        # whether services are reached
        "HF_HUB_OFFLINE HF_DATASETS_OFFLINE TRANSFORMERS_OFFLINE WANDB_MODE "
        "COMET_START_ONLINE "
    ).split()
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

    Credentials in their values are redacted.
    """
    names = sorted(VARIABLES & environment.keys())
    return {name: redact(environment[name]) for name in names}


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
        "folder": redact(os.getcwd()),
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
