"""Whether a checkpoint resumes at another topology: the same state, and the same steps from it."""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch

from pretrain.checkpoint import layout
from pretrain.checkpoint.state_hashes import state_hashes
from pretrain.config.recipe import Recipe
from pretrain.config.rules.sections import check_topology
from pretrain.core.errors import CheckpointError, ConfigError
from pretrain.core.files import JsonObject
from pretrain.engine.ds_config import reopen_ds_config
from pretrain.verification.job import Job, Layout, Observed, recipe_for, saved_ds_config
from pretrain.verification.ranks import run_ranks

# Relative distances of losses and gradient norms that rounding explains: sums over ranks have
# another order. Optimizers that divide by the size of a gradient, or take its sign, amplify it.
FP32_TOLERANCE = {"sgd": 1e-6, "adamw": 1e-5, "muon": 1e-5, "lion": 1e-3, "adamw_8bit": 1e-2}
OTHER_OPTIMIZER = 1e-3
LOW_PRECISION = {"bf16": 3e-2, "fp16": 3e-2, "fp8": 1e-1}
TF32_TOLERANCE = 1e-2
# Steps that draw experts at random draw others on other ranks.
RANDOM_TOLERANCE = 1e-1
# Of 8-bit states, as a share of the largest value: half of the widest gap between two levels.
REQUANTIZED_TOLERANCE = 2e-2


@dataclass(frozen=True)
class Tolerance:
    """How far losses and norms of two topologies may be apart, relative, and why."""

    value: float
    reason: str


def tolerance_of(recipe: Recipe, other_parts: bool = False) -> Tolerance:
    """Return what rounding explains in steps of a recipe, whose precision is resolved.

    Args:
        other_parts: the two topologies have other parts of each sequence on a rank.
    """
    train, kind = recipe.train, recipe.optimizer.kind
    routing = recipe.model.routing
    if routing is not None and (routing.draws_experts or routing.router.learned_noise):
        return Tolerance(RANDOM_TOLERANCE, "experts are drawn at random, other ones on other ranks")
    if other_parts and routing is not None and routing.router.jitter:
        return Tolerance(
            RANDOM_TOLERANCE, "router jitter is another one at another sp_size or tp_size"
        )
    if other_parts and routing is not None and routing.drops_tokens:
        return Tolerance(
            RANDOM_TOLERANCE, "full experts drop other tokens at another sp_size or tp_size"
        )
    value = FP32_TOLERANCE.get(kind, OTHER_OPTIMIZER)
    reason = f"{train.precision}, {kind}"
    if train.precision != "fp32":
        value = max(value, LOW_PRECISION[train.precision])
    elif train.tf32:
        value, reason = max(value, TF32_TOLERANCE), f"{reason}, TF32"
    return Tolerance(value, reason)


@dataclass(frozen=True)
class Request:
    """What a user asks to prove.

    Attributes:
        ds_config: that the run would be resumed with, and where it is from; None for the
            checkpoint's own at ``asked.zero_stage``.
        tolerance: instead of :func:`tolerance_of`.
    """

    checkpoint: Path
    asked: Layout
    steps: int
    overrides: list[str] = field(default_factory=list)
    ds_config: tuple[JsonObject, str] | None = None
    random_tokens: bool = False
    on_cpu: bool = False
    tolerance: float | None = None


@dataclass(frozen=True)
class Step:
    """A step as both sides saw it; the distances are relative."""

    step: int
    loss: tuple[float, float]
    norm: tuple[float, float]

    @property
    def loss_distance(self) -> float:
        """Of the losses."""
        return distance(*self.loss)

    @property
    def norm_distance(self) -> float:
        """Of the gradient norms."""
        return distance(*self.norm)


@dataclass(frozen=True)
class Proof:
    """The result of a check.

    Attributes:
        reference, asked: the two topologies.
        why: of the reference's topology, in words.
        tensors: of the checkpoint: weights, buffers and optimizer states.
    """

    checkpoint: str
    reference: Layout
    why: str
    asked: Layout
    device: str
    tensors: int
    observed: tuple[Observed, Observed]
    steps: list[Step]
    tolerance: Tolerance

    @property
    def faults(self) -> list[str]:
        """What speaks against the checkpoint's resume, one sentence each; empty if nothing does."""
        found = []
        for place, seen in zip((self.reference, self.asked), self.observed, strict=True):
            far = [
                name
                for name, share in seen.requantized.items()
                if not share <= REQUANTIZED_TOLERANCE
            ]
            names = [*seen.differing, *far]
            if names:
                found.append(
                    f"{len(names)} of {self.tensors} tensors are other ones after a load and save "
                    f"at {place}, the first is '{names[0]}'"
                )
        if self.observed[0].data != self.observed[1].data:
            found.append(
                f"the steps were taken on {self.observed[0].data} at {self.reference}, and on "
                f"{self.observed[1].data} at {self.asked}"
            )
        limit = self.tolerance.value
        for step in self.steps:
            for what, pair, apart in (
                ("loss", step.loss, step.loss_distance),
                ("gradient norm", step.norm, step.norm_distance),
            ):
                if not apart <= limit:
                    found.append(
                        f"the {what} of step {step.step} is {pair[0]:.9g} at {self.reference} and "
                        f"{pair[1]:.9g} at {self.asked}, {apart:.1e} apart, and {limit:.0e} is "
                        "allowed"
                    )
        return found

    def to_dict(self) -> JsonObject:
        """Return it as JSON has it."""
        sides = {}
        for name, place, seen in zip(
            ("reference", "asked"), (self.reference, self.asked), self.observed, strict=True
        ):
            sides[name] = {
                "world_size": place.world_size,
                "ep_size": place.ep_size,
                "sp_size": place.sp_size,
                "tp_size": place.tp_size,
                "zero_stage": place.zero_stage,
                "data": seen.data,
                "seconds": seen.seconds,
                "differing_tensors": seen.differing,
                "requantized_tensors": seen.requantized,
            }
        return {
            "checkpoint": self.checkpoint,
            "resumes": not self.faults,
            "faults": self.faults,
            "device": self.device,
            "tensors": self.tensors,
            **sides,
            "why_reference": self.why,
            "tolerance": self.tolerance.value,
            "tolerance_reason": self.tolerance.reason,
            "steps": [
                {
                    "step": step.step,
                    "loss": list(step.loss),
                    "loss_distance": step.loss_distance,
                    "grad_norm": list(step.norm),
                    "grad_norm_distance": step.norm_distance,
                }
                for step in self.steps
            ],
        }


def distance(one: float, other: float) -> float:
    """Return how far two numbers are apart, relative to the larger one; NaN if one is not finite.

    Two equal infinities are no proof of anything.
    """
    if not (math.isfinite(one) and math.isfinite(other)):
        return math.nan
    largest = max(abs(one), abs(other))
    return abs(one - other) / largest if largest else 0.0


def own_layout(checkpoint: Path) -> Layout:
    """Return the topology that a checkpoint was saved at.

    Raises:
        CheckpointError: if it does not say.
    """
    state = layout.read_state(checkpoint)
    if "engine" not in state:
        raise CheckpointError(
            f"{checkpoint} has weights, but no optimizer state to resume: choose a checkpoint of "
            "a training"
        )
    if "world_size" not in state or "ep_size" not in state or "zero_stage" not in state:
        raise CheckpointError(
            f"{checkpoint} does not say at which topology it was saved: choose one of a training"
        )
    # Checkpoints of older versions have no such sizes: then no ranks shared a sequence.
    return Layout(
        state["world_size"],
        state["ep_size"],
        state["zero_stage"],
        state.get("sp_size", 1),
        state.get("tp_size", 1),
    )


def reference_layout(
    own: Layout, asked: Layout, recipe: Recipe, devices: int
) -> tuple[Layout, str]:
    """Return the topology to compare with, and why it is this one.

    Args:
        own: of the checkpoint.
        recipe: with the overrides, at the checkpoint's ``ep_size``, ``sp_size`` and
            ``tp_size``.
        devices: that ranks can have for themselves.
    """
    single = Layout(1, 1, own.zero_stage)
    if own == asked:
        return single, "one rank, because the checkpoint was saved at the topology asked for"
    if own.world_size > max(devices, asked.world_size):
        return single, (
            f"one rank, because the checkpoint's {own.world_size} ranks do not fit the "
            f"{devices} devices here"
        )
    try:
        check_topology(recipe, own.world_size, own.zero_stage)
    except ConfigError:
        return single, "one rank, because the batch sizes asked for do not fit the checkpoint's own"
    return own, "the checkpoint's own"


def available_devices(on_cpu: bool) -> int:
    """Return how many ranks can have a device for themselves: GPUs, or cores without them."""
    if on_cpu or not torch.cuda.is_available():
        return len(os.sched_getaffinity(0))
    return torch.cuda.device_count()


def _enough_devices(asked: Layout, on_cpu: bool) -> int:
    """Return how many devices there are, at least one for each rank that is asked for if GPUs."""
    devices = available_devices(on_cpu)
    if not on_cpu and asked.world_size > devices:
        raise ConfigError(
            f"--world-size is {asked.world_size}, but there are {devices} GPUs here: add --cpu"
        )
    return devices


def prove(request: Request, scratch: Path) -> Proof:
    """Load the checkpoint at both topologies, save it again, take the steps, and compare.

    Args:
        scratch: an empty folder; it gets a copy of the checkpoint, one at a time.

    Raises:
        PipelineError: if the checkpoint is damaged, or a side cannot run at all.
    """
    folder = request.checkpoint
    if fault := layout.damage(folder):
        raise CheckpointError(f"{folder} is damaged: {fault}; choose another step_N folder")
    own = own_layout(folder)
    saved = saved_ds_config(folder)
    recipe = recipe_for(folder, request.overrides, own)
    on_cpu = request.on_cpu or not torch.cuda.is_available()
    devices = _enough_devices(request.asked, on_cpu)
    asked_recipe = recipe_for(folder, request.overrides, request.asked)
    check_topology(asked_recipe, request.asked.world_size, request.asked.zero_stage)
    reference, why = reference_layout(own, request.asked, recipe, devices)
    hashes = state_hashes(folder)
    observed = []
    for name, place in (("reference", reference), ("asked", request.asked)):
        ds_config, origin = (
            reopen_ds_config(saved, recipe, place.zero_stage),
            f"the ds_config of {folder.name}",
        )
        if place is request.asked and request.ds_config is not None:
            ds_config, origin = request.ds_config
        side = scratch / name
        side.mkdir()
        job = Job(
            checkpoint=str(folder.resolve()),
            folder=str(side),
            layout=place,
            overrides=[*request.overrides, f"run_path={side}"],
            ds_config=ds_config,
            origin=origin,
            steps=request.steps,
            random_tokens=request.random_tokens,
            hashes=hashes,
        )
        observed.append(run_ranks(job, on_cpu))
        shutil.rmtree(side)
    first, second = observed
    step = layout.read_state(folder)["step"]
    parts = [place.sp_size * place.tp_size for place in (request.asked, reference)]
    tolerance = tolerance_of(recipe, parts[0] != parts[1])
    if request.tolerance is not None:
        tolerance = Tolerance(request.tolerance, "as asked for")
    return Proof(
        checkpoint=str(folder),
        reference=reference,
        why=why,
        asked=request.asked,
        device="CPU" if on_cpu else torch.cuda.get_device_name(),
        tensors=len(hashes),
        observed=(first, second),
        steps=[
            Step(step + number, (a, b), (c, d))
            for number, (a, b, c, d) in enumerate(
                zip(first.losses, second.losses, first.norms, second.norms, strict=True), start=1
            )
        ],
        tolerance=tolerance,
    )
