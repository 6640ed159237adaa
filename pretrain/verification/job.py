"""What one side of a resume check is asked to do, and what it has seen; both travel as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from pretrain.checkpoint.layout import DS_CONFIG, RECIPE
from pretrain.config.load import apply_override, parse_yaml, validate_recipe
from pretrain.config.recipe import Recipe, shared_sizes
from pretrain.core.errors import CheckpointError
from pretrain.core.files import JsonObject
from pretrain.core.strict_json import NotAnObject, read_object

JOB = "job.json"
RESULT = "result.json"


@dataclass(frozen=True)
class Layout:
    """How many ranks share a model, and how.

    Attributes:
        zero_stage: of ZeRO.
        sp_size: ranks that share each sequence; times ``tp_size`` if tensors are shared too.
        tp_size: ranks that share tensors.
    """

    world_size: int
    ep_size: int
    zero_stage: int
    sp_size: int = 1
    tp_size: int = 1

    def __str__(self) -> str:
        ranks = "1 rank" if self.world_size == 1 else f"{self.world_size} ranks"
        shared = shared_sizes(self.sp_size, self.tp_size)
        return f"{ranks}, ep_size {self.ep_size}{shared}, ZeRO {self.zero_stage}"


@dataclass(frozen=True)
class Job:
    """One side of the check: load, save again, and take some steps.

    Attributes:
        folder: of this side alone, on a disk with space for a checkpoint.
        overrides: ``a.b=c`` for the checkpoint's recipe.
        ds_config: not yet resolved; ``origin`` says where it is from.
        random_tokens: take steps on random tokens, also if the run's data are there.
        hashes: of the checkpoint, see :func:`pretrain.checkpoint.state_hashes.state_hashes`.
    """

    checkpoint: str
    folder: str
    layout: Layout
    overrides: list[str]
    ds_config: JsonObject
    origin: str
    steps: int
    random_tokens: bool
    hashes: dict[str, str]

    def write(self) -> Path:
        """Write it into its folder, and return the file."""
        path = Path(self.folder) / JOB
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")
        return path

    @classmethod
    def read(cls, path: Path) -> Job:
        """Return the job in a file."""
        content = json.loads(path.read_text(encoding="utf-8"))
        return cls(**content | {"layout": Layout(**content["layout"])})


@dataclass(frozen=True)
class Observed:
    """What one side has seen.

    Attributes:
        differing: tensors that are other ones in the checkpoint it has saved again, in its order.
        requantized: 8-bit states whose blocks are others in this topology, and how far their
            values are from the checkpoint's, as a share of the largest one.
        losses: of each step, nats a token, router losses included.
        norms: of the gradient in each step, before clipping.
        data: what the steps were taken on, in words.
    """

    differing: list[str]
    requantized: dict[str, float]
    losses: list[float]
    norms: list[float]
    data: str
    seconds: float

    def write(self, folder: Path) -> None:
        """Write it for the process that asked."""
        (folder / RESULT).write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Observed:
        """Return what a side has written."""
        return cls(**json.loads((folder / RESULT).read_text(encoding="utf-8")))


def recipe_for(checkpoint: Path, overrides: list[str], layout: Layout) -> Recipe:
    """Return the recipe of a checkpoint's whole run at another topology.

    Raises:
        ConfigError: for a field that does not exist or fit.
        CheckpointError: if there is no recipe.
    """
    path = checkpoint / RECIPE
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError):
        raise CheckpointError(
            f"{path} is missing or damaged: choose another step_N folder"
        ) from None
    sizes = {"ep_size": layout.ep_size, "sp_size": layout.sp_size, "tp_size": layout.tp_size}
    topology = [f"parallel.{name}={size}" for name, size in sizes.items()]
    for override in [*overrides, *topology, "logging.tensorboard=false"]:
        apply_override(content, override)
    return validate_recipe(content, str(path))


def saved_ds_config(checkpoint: Path) -> JsonObject:
    """Return the resolved ds_config of a checkpoint.

    Raises:
        CheckpointError: if it is missing or damaged.
    """
    try:
        return read_object(checkpoint / DS_CONFIG)
    except NotAnObject as error:
        raise CheckpointError(
            f"{checkpoint / DS_CONFIG} {error}: the checkpoint is damaged, choose another step_N "
            "folder"
        ) from None
