"""What a run is made of: for training, the LR finder, benchmarks and tests."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from data_pipeline.loading.factory import open_loader
from data_pipeline.loading.interface import Loader
from data_pipeline.loading.packing import Windows, prepare_packing
from data_pipeline.shards.datasets import Datasets, data_folders, load_datasets
from data_pipeline.shards.verification import BackgroundCheck
from pretrain.callbacks.build import make_callbacks
from pretrain.checkpoint.initialize_from import starting_weights
from pretrain.checkpoint.store import CheckpointStore
from pretrain.config.loader_plan import loader_plan
from pretrain.config.recipe import Recipe
from pretrain.config.rules.sections import check_topology
from pretrain.config.timeline import Timeline
from pretrain.core.errors import ConfigError, DataError
from pretrain.core.signals import StopRequest
from pretrain.engine.build import WeightLoader
from pretrain.engine.determinism import be_deterministic
from pretrain.engine.ds_config import resolve_ds_config, zero_stage_of
from pretrain.engine.engine import Engine
from pretrain.engine.precision import resolve_precision
from pretrain.engine.topology import Topology, connect, world_size_from_environment
from pretrain.guards.incidents import IncidentLog
from pretrain.guards.policy import GuardPolicy
from pretrain.model.sizes import model_size, peak_flops
from pretrain.run.folder import CHECKPOINTS, USAGE
from pretrain.training.checkpointing import Checkpoints, RunParts
from pretrain.training.metrics import MetricsRecorder
from pretrain.training.records import RecordWriter
from pretrain.training.schedules import schedules_of
from pretrain.training.stopping import Stopping
from pretrain.training.timing import StepTimer
from pretrain.training.trainer import Trainer
from pretrain.training.validation import Validator


@dataclass(frozen=True)
class ResolvedRun:
    """A run before it has a model: what was left open is resolved, the ranks are connected.

    Attributes:
        recipe: with the vocabulary's size and the precision that are used.
        timeline: its phases.
        ds_config: with what the recipe owns.
    """

    recipe: Recipe
    timeline: Timeline
    datasets: Datasets
    topology: Topology
    ds_config: dict[str, Any]

    @property
    def precision(self) -> str:
        """``fp32``, ``bf16``, ``fp16`` or ``fp8``."""
        return self.recipe.train.precision

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.recipe.output_path)

    @property
    def checkpoints(self) -> Path:
        """The folder of its checkpoints."""
        return self.folder / CHECKPOINTS


@dataclass(frozen=True)
class Run:
    """A run that is ready to train.

    Attributes:
        held_out: windows of the validation split; None if there is none.
    """

    resolved: ResolvedRun
    engine: Engine
    loader: Loader
    held_out: Windows | None


def resolve_recipe(recipe: Recipe, precision: str, datasets: Datasets | None) -> Recipe:
    """Fill in what is left open: the number format, and the vocabulary's size.

    That is the data's or, before there is any, that of its plan.

    Raises:
        DataError: if the recipe's vocabulary is smaller than the tokenizer's.
    """
    planned = datasets.tokenizer.vocab_size if datasets else recipe.data.tokenizer.vocab_size
    vocab_size = recipe.model.vocab_size or planned
    if vocab_size is None:
        raise DataError(
            "the vocabulary's size is not known before there is data in "
            f"{recipe.data_path}: build it, or set model.vocab_size"
        )
    if datasets and vocab_size < datasets.tokenizer.vocab_size:
        raise DataError(
            f"model.vocab_size is {vocab_size}, but the tokenizer of {datasets.place} has "
            f"{datasets.tokenizer.vocab_size} entries: leave model.vocab_size out"
        )
    model = recipe.model.model_copy(update={"vocab_size": vocab_size})
    train = recipe.train.model_copy(update={"precision": precision})
    return recipe.model_copy(update={"model": model, "train": train})


def share_cores() -> None:
    """On a CPU without OMP_NUM_THREADS, let ranks of one machine share its cores evenly."""
    if "OMP_NUM_THREADS" not in os.environ and not torch.cuda.is_available():
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))


def resolve_run(recipe: Recipe, ds_config: dict[str, Any], origin: str) -> ResolvedRun:
    """Resolve what the recipe leaves open, and connect the ranks. Every rank must call it.

    Args:
        origin: of the ds_config, for sentences.

    Raises:
        ConfigError: if recipe, ds_config, ranks and device do not fit together.
        DataError: if the data are missing or damaged.
    """
    zero_stage = zero_stage_of(ds_config, origin)
    datasets = load_datasets(data_folders(recipe.data, recipe.data_path))
    datasets.verify()
    world_size = world_size_from_environment(os.environ)
    accumulation = check_topology(recipe, world_size, zero_stage)
    precision = resolve_precision(recipe.train.precision)
    recipe = resolve_recipe(recipe, precision, datasets)
    share_cores()
    if recipe.train.deterministic:
        be_deterministic()  # before the first CUDA kernel
    topology = connect(recipe.parallel.ep_size)
    resolved = resolve_ds_config(
        ds_config, origin, recipe, precision, accumulation, topology.world_size
    )
    return ResolvedRun(recipe, Timeline(recipe), datasets, topology, resolved)


def pack_data(resolved: ResolvedRun) -> None:
    """Let rank 0 pack documents into sequences, if the recipe asks for it and it is not done."""
    if resolved.topology.is_main:
        length = resolved.timeline.block_tokens
        prepare_packing(resolved.datasets, resolved.recipe.data, length, progress=True)
    resolved.topology.barrier()


def check_data(resolved: ResolvedRun) -> BackgroundCheck:
    """Begin to compare this rank's share of the data with its manifests (``data.verify``)."""
    topology = resolved.topology
    verify = resolved.recipe.data.verify
    return resolved.datasets.check_blocks(verify, topology.rank, topology.world_size)


def initial_weights(resolved: ResolvedRun, checkpoints: Path | None) -> WeightLoader | None:
    """What a new run starts from instead of random weights; None if there is nothing of the kind.

    Args:
        checkpoints: if there is one in this folder, the run is not new. None for a run without a
            folder, which is always new and writes no report.

    Raises:
        CheckpointError: if the weights are missing or do not fit.
    """
    sha256 = resolved.datasets.tokenizer.sha256
    return starting_weights(resolved.recipe, sha256, checkpoints, resolved.topology)


def build_run(
    resolved: ResolvedRun, load_weights: WeightLoader | None, num_steps: int | None = None
) -> Run:
    """Open the data and build the engine. Every rank must call it.

    Args:
        load_weights: overwrites the random weights.
        num_steps: steps that there must be data for, if not those of the recipe.

    Raises:
        ConfigError: if batch sizes or mixture do not fit the data.
        DataError: if there are too few.
    """
    recipe = resolved.recipe
    datasets = resolved.datasets
    topology = resolved.topology
    plan = loader_plan(recipe, resolved.timeline)
    loader = open_loader(recipe.data, datasets, plan, topology.rank, topology.world_size)
    stream = datasets.validation_stream()
    held_out: Windows | None = None
    if stream:
        length = recipe.train.sequence_length
        held_out = Windows(stream, length, datasets.pad_id, recipe.data.document_mask)
    if num_steps is not None:
        loader.require(num_steps)
    engine = Engine(recipe, resolved.ds_config, resolved.precision, topology, load_weights)
    return Run(resolved, engine, loader, held_out)


def build_trainer(run: Run, stop: StopRequest, data_check: BackgroundCheck) -> Trainer:
    """Wire the engine, the data, guards, checkpoints and callbacks of a run to a loop.

    Args:
        stop: set by a signal.
        data_check: what this rank still compares of the data with its manifest.

    Raises:
        ConfigError: if a guard needs a validation split that the data does not have.
    """
    resolved = run.resolved
    recipe = resolved.recipe
    if recipe.guards.early_stopping is not None and run.held_out is None:
        raise ConfigError(
            "guards.early_stopping looks at the validation loss, but the data has no validation "
            "split: build one, or leave it out"
        )
    engine = run.engine
    topology = resolved.topology
    folder = resolved.folder
    store = CheckpointStore(
        resolved.checkpoints, engine, resolved.ds_config, resolved.datasets.tokenizer_path
    )
    callbacks = []
    if topology.is_main:
        callbacks = make_callbacks(
            recipe,
            resolved.ds_config,
            engine,
            run.held_out is not None,
            resolved.checkpoints,
            folder / USAGE,
        )
    incidents = IncidentLog(folder, run.loader, topology)
    if (guard := recipe.guards.stalled_data) is not None:
        wait = run.loader.prefetch_wait
        wait.watch(guard.warn_seconds, guard.stop_seconds, incidents.report_stall)
    guards = GuardPolicy(recipe.guards, engine, incidents)
    timer = StepTimer()
    writer = RecordWriter(resolved.timeline, run.loader, callbacks)
    peak = peak_flops(topology.device, resolved.precision)
    metrics = MetricsRecorder(
        engine, run.loader, guards, writer, timer, recipe.model, recipe.logging, peak
    )
    validator: Validator | None = None
    if run.held_out is not None:
        validator = Validator(run.held_out, engine, run.loader, recipe.validation, writer, timer)
    stopping = Stopping(stop, data_check, topology)
    return Trainer(
        timeline=resolved.timeline,
        schedules=schedules_of(recipe, resolved.timeline),
        engine=engine,
        loader=run.loader,
        guards=guards,
        metrics=metrics,
        validator=validator,
        checkpoints=Checkpoints(
            store,
            recipe.checkpoint,
            RunParts(resolved.timeline, run.loader, guards, metrics, timer),
            stopping,
            _fingerprint(resolved, engine.zero_stage),
            _card_facts(resolved),
        ),
        stopping=stopping,
        timer=timer,
        callbacks=callbacks,
    )


def _fingerprint(resolved: ResolvedRun, zero_stage: int) -> dict[str, Any]:
    """What must be the same for a checkpoint to be resumed; the loader looks at the data itself."""
    return {
        "tokenizer_sha256": resolved.datasets.tokenizer.sha256,
        "world_size": resolved.topology.world_size,
        "ep_size": resolved.topology.ep_size,
        "zero_stage": zero_stage,
    }


def _card_facts(resolved: ResolvedRun) -> dict[str, Any]:
    """What a model card says besides recipe and progress."""
    size = model_size(resolved.recipe.model, resolved.recipe.train.sequence_length)
    sources = resolved.datasets.training_sources()
    return {
        "parameters": {"total": size.parameters_total, "active": size.parameters_active},
        "sources": {name: asdict(source) for name, source in sources.items()},
    }
