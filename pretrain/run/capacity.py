"""Whether a machine can hold a rank's part of a model, before a single tensor exists.

Only what is surely impossible is refused: weights and optimizer state must be in memory for the
whole run, and a rank's weights and two tensors when the model is built. Gradients, activations and
buffers come on top of that; they are in a warning.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from pretrain.core.errors import ConfigError
from pretrain.core.files import JsonObject
from pretrain.model.sizes import model_size
from pretrain.run.memory import activation_bytes, start_bytes_per_rank, state_bytes_per_rank
from pretrain.run.resolve import ResolvedConfig

# More memory than any server has that is sold as one machine.
LARGEST_HOST_BYTES = 2**46
MOST_RANKS = 2**20
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Machine:
    """Memory of the machine of this rank.

    Attributes:
        host_bytes: of the host, swap included.
        gpu_bytes: of the GPU of this rank; None on a CPU.
        ranks: that share the host.
    """

    host_bytes: int
    gpu_bytes: int | None
    ranks: int


@dataclass(frozen=True)
class Demand:
    """Bytes that one rank needs at least.

    Attributes:
        built: of the host when the model is built: its weights if they are there, and two tensors.
        host, gpu: of weights and optimizer state for the whole run; ``gpu`` on a GPU only.
        likely: with gradients and activations, where weights are.
    """

    built: int
    host: int
    gpu: int
    likely: int


def this_machine() -> Machine:
    """Measure the machine that this rank was started on."""
    swap = psutil.swap_memory().total
    host = psutil.virtual_memory().total
    # In a container the limit counts, which the system's own figures do not show.
    if CGROUP_LIMIT.is_file() and (limit := CGROUP_LIMIT.read_text().strip()).isdigit():
        host = min(host, int(limit))
    ranks = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1"
    gpu = None
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0).total_memory
    return Machine(host + swap, gpu, int(ranks) if ranks.isdigit() else 1)


def check_world_size(world_size: int) -> None:
    """Refuse a number of ranks that no cluster has.

    Raises:
        ConfigError: if it is not from 1 to 2^20.
    """
    if not 1 <= world_size <= MOST_RANKS:
        raise ConfigError(
            f"--world-size {world_size} is no number of ranks: give one from 1 to {MOST_RANKS}"
        )


def demand_of(config: ResolvedConfig, has_gpu: bool) -> Demand:
    """Return what a rank of a resolved run needs at least."""
    recipe = config.recipe
    size = model_size(recipe.model, recipe.train.sequence_length, recipe.parallel.tp_size)
    state = state_bytes_per_rank(
        size,
        recipe.train.precision,
        config.zero_stage,
        config.world_size,
        recipe.parallel.ep_size,
        recipe.optimizer,
    )
    activations = max(
        activation_bytes(
            recipe.model, phase.recipe.train, recipe.train.precision, recipe.parallel.token_parts
        )
        for phase in config.timeline.phases
    )
    zero = config.ds_config.get("zero_optimization", {})
    places = {"host": 0, "gpu": 0, "nvme": 0}
    usual = "gpu" if has_gpu else "host"
    for part, offload in (("weights", "offload_param"), ("optimizer", "offload_optimizer")):
        place = _place(zero.get(offload), usual)
        # DeepSpeed may leave a part of it where it was.
        share = (zero.get(offload) or {}).get("ratio", 1.0) if place != usual else 1.0
        places[place] += int(state[part] * share)
    start = start_bytes_per_rank(
        size,
        state,
        recipe.train.precision,
        config.zero_stage,
        config.world_size,
        recipe.parallel.ep_size,
    )
    # On a GPU weights are made there, one by one; at stage 3 DeepSpeed joins the parts of a rank on
    # the host once.
    on_device = has_gpu and config.zero_stage < 3
    return Demand(
        built=start["built"] - (state["weights"] if on_device else 0),
        host=places["host"],
        gpu=places["gpu"],
        likely=places[usual] + state["gradients"] + activations,
    )


def _place(offload: JsonObject | None, usual: str) -> str:
    device = (offload or {}).get("device", "none")
    # Without a GPU the host is where everything is anyway.
    return {"cpu": "host", "nvme": "nvme"}.get(device, usual)


def check_any_machine(demand: Demand, world_size: int) -> None:
    """Refuse a model whose rank no machine can hold.

    Raises:
        ConfigError: with what the rank needs.
    """
    needed = max(demand.built, demand.host, demand.gpu)
    if needed > LARGEST_HOST_BYTES:
        raise ConfigError(
            f"one of {world_size} ranks would hold {_gigabytes(needed)} of weights and optimizer "
            f"state, and no machine has more than {_gigabytes(LARGEST_HOST_BYTES)}: lower the "
            "sizes in 'model', or use more ranks with ZeRO stage 3 or parallel.ep_size"
        )


def check_machine(demand: Demand, machine: Machine, world_size: int) -> str | None:
    """Refuse a model whose rank this machine cannot hold.

    Returns:
        A warning if it can hold weights and optimizer state, but hardly what comes on top.

    Raises:
        ConfigError: with what the rank needs and what there is.
    """
    check_any_machine(demand, world_size)
    hint = (
        "lower the sizes in 'model', use more ranks with ZeRO stage 3 or parallel.ep_size, or a "
        "larger machine"
    )
    if demand.built > machine.host_bytes:
        raise ConfigError(
            f"a rank's model takes {_gigabytes(demand.built)} of weights and two tensors when it "
            f"is built, and this machine has {_gigabytes(machine.host_bytes)}: {hint}"
        )
    ranks = f"{machine.ranks} ranks" if machine.ranks > 1 else "the one rank"
    if demand.host * machine.ranks > machine.host_bytes:
        raise ConfigError(
            f"weights and optimizer state of {ranks} here take "
            f"{_gigabytes(demand.host * machine.ranks)} of this machine's memory, which has "
            f"{_gigabytes(machine.host_bytes)}: {hint}"
        )
    if machine.gpu_bytes is not None and demand.gpu > machine.gpu_bytes:
        raise ConfigError(
            f"weights and optimizer state of a rank take {_gigabytes(demand.gpu)}, and its GPU has "
            f"{_gigabytes(machine.gpu_bytes)}: {hint}, or a ds_config with offload"
        )
    available = machine.gpu_bytes or machine.host_bytes // machine.ranks
    if demand.likely > available:
        return (
            f"with gradients and activations a rank takes about {_gigabytes(demand.likely)}, and "
            f"there are {_gigabytes(available)} for it: it may run out of memory"
        )
    return None


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB"
