"""Builds a run from its parts: for training, the LR finder, benchmarks and tests."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from data_pipeline.loading.factory import open_loader, prepare_files
from data_pipeline.loading.interface import Loader
from data_pipeline.loading.packing import Windows
from data_pipeline.shards.datasets import Datasets, data_folders, load_datasets
from data_pipeline.shards.recorded import data_warnings
from data_pipeline.shards.verification import BackgroundCheck
from pretrain.callbacks.base import CallbackList
from pretrain.callbacks.build import make_callbacks
from pretrain.checkpoint.initialize_from import starting_weights
from pretrain.checkpoint.state import CardFacts, Fingerprint
from pretrain.checkpoint.store import CheckpointStore
from pretrain.config.loader_plan import loader_plan
from pretrain.config.recipe import Recipe
from pretrain.config.timeline import Timeline
from pretrain.core.errors import ConfigError, DataError, PipelineError
from pretrain.core.files import JsonObject
from pretrain.core.signals import StopRequest
from pretrain.engine.build import WeightLoader
from pretrain.engine.determinism import be_deterministic
from pretrain.engine.ds_config import zero_stage_of
from pretrain.engine.engine import Engine
from pretrain.engine.precision import resolve_precision
from pretrain.engine.topology import (
    Topology,
    connect,
    starts_as_first_rank,
    world_size_from_environment,
)
from pretrain.evaluation.tasks.code import read_problems
from pretrain.guards.incidents import IncidentLog
from pretrain.guards.policy import GuardPolicy
from pretrain.model.sizes import model_size, peak_flops
from pretrain.run.capacity import check_machine, demand_of, this_machine
from pretrain.run.folder import CHECKPOINTS, USAGE
from pretrain.run.resolve import resolve_config
from pretrain.training.checkpointing import Checkpoints, RunParts
from pretrain.training.goodput import GoodputMeter
from pretrain.training.hardware import HardwareMeter
from pretrain.training.metrics import MetricsRecorder, timing_interval
from pretrain.training.records import RecordWriter
from pretrain.training.schedules import schedules_of
from pretrain.training.slow_ranks import OwnTime
from pretrain.training.stopping import Stopping
from pretrain.training.timing import StepTimer
from pretrain.training.trainer import Trainer
from pretrain.training.validation import Validator

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResolvedRun:
    """A run before it has a model: its configuration is resolved, its ranks are connected.

    Attributes:
        recipe: with the vocabulary's size and the precision that are used.
        timeline: its phases.
        ds_config: with what the recipe owns.
    """

    recipe: Recipe
    timeline: Timeline
    datasets: Datasets
    topology: Topology
    ds_config: JsonObject

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


def share_cores() -> None:
    """On a CPU without OMP_NUM_THREADS, let ranks of one machine share its cores evenly."""
    # Without this every rank starts a thread for each core, and they wait for each other.
    if "OMP_NUM_THREADS" not in os.environ and not torch.cuda.is_available():
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))


def resolve_run(recipe: Recipe, ds_config: JsonObject, origin: str) -> ResolvedRun:
    """Resolve what the recipe leaves open, and connect the ranks. Every rank must call it.

    Args:
        origin: of the ds_config, for sentences.

    Raises:
        ConfigError: if recipe, ds_config, ranks and device do not fit together.
        DataError: if the data are missing or damaged.
    """
    # All that can be checked without other ranks comes before they are connected: a rank that fails
    # later makes the others wait for a timeout.
    zero_stage = zero_stage_of(ds_config, origin)
    datasets = load_datasets(data_folders(recipe.data, recipe.data_path))
    datasets.verify()
    unreadable = None
    if starts_as_first_rank(os.environ):
        for warning in data_warnings(recipe.data, datasets):
            print(f"warning: {warning}", file=sys.stderr)
        # The first evaluation, hours later, would be the first to miss them; its machine is this.
        if recipe.evaluation is not None and recipe.evaluation.code is not None:
            unreadable = _problems_error(Path(recipe.evaluation.code.problems))
    config = resolve_config(
        recipe,
        ds_config,
        origin=origin,
        zero_stage=zero_stage,
        world_size=world_size_from_environment(os.environ),
        choose_precision=resolve_precision,
        datasets=datasets,
    )
    machine = this_machine()
    demand = demand_of(config, machine.gpu_bytes is not None)
    too_large = check_machine(demand, machine, config.world_size)
    if too_large is not None and starts_as_first_rank(os.environ):
        print(f"warning: {too_large}", file=sys.stderr)
    share_cores()
    if recipe.train.deterministic:
        # Before the first CUDA kernel: cuBLAS reads its workspace size once.
        be_deterministic()
    parallel = recipe.parallel
    topology = connect(
        parallel.ep_size,
        parallel.timeout_seconds,
        sp_size=parallel.sp_size,
        tp_size=parallel.tp_size,
    )
    # All ranks end together: the first one alone would let the others wait.
    if topology.any_rank(unreadable is not None):
        raise unreadable or DataError("the first rank cannot read evaluation.code.problems")
    return ResolvedRun(config.recipe, config.timeline, datasets, topology, config.ds_config)


def _problems_error(path: Path) -> PipelineError | None:
    try:
        read_problems(path)
    except PipelineError as error:
        return error
    return None


def pack_data(resolved: ResolvedRun) -> None:
    """Let rank 0 pack or order the samples, unless that is done or not asked for."""
    # The result is files next to the data: one writer, and all others wait for it.
    if resolved.topology.is_main:
        plan = loader_plan(resolved.recipe, resolved.timeline)
        prepare_files(resolved.recipe.data, resolved.datasets, plan)
    resolved.topology.barrier()


def check_data(resolved: ResolvedRun) -> BackgroundCheck:
    """Begin to compare this rank's share of the data with its manifests (``data.verify``)."""
    topology = resolved.topology
    verify = resolved.recipe.data.verify
    return resolved.datasets.check_blocks(verify, topology.rank, topology.world_size)


def initial_weights(resolved: ResolvedRun, checkpoints: Path | None) -> WeightLoader | None:
    """Return what a new run starts from instead of random weights; None for random ones.

    Args:
        checkpoints: a folder; a run with a checkpoint in it is not new. None for a run without a
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
        num_steps: the data must last for these steps; None if that is checked later.

    Raises:
        ConfigError: if batch sizes or mixture do not fit the data.
        DataError: if the data do not last.
    """
    recipe = resolved.recipe
    datasets = resolved.datasets
    topology = resolved.topology
    # Data first: they fail in a second, and an engine of many billion parameters takes minutes.
    plan = loader_plan(recipe, resolved.timeline)
    loader = open_loader(recipe.data, datasets, plan, topology.dp_rank, topology.dp_size)
    stream = datasets.validation_stream()
    held_out: Windows | None = None
    if stream:
        # The validator changes the length when a phase does.
        length = recipe.train.sequence_length
        held_out = Windows(stream, length, datasets.pad_id, recipe.data.document_mask)
    # A training checks this after its resume, which may pass over data.
    if num_steps is not None:
        loader.require(num_steps)
    engine = Engine(recipe, resolved.ds_config, resolved.precision, topology, load_weights)
    return Run(resolved, engine, loader, held_out)


def build_trainer(run: Run, stop: StopRequest, data_check: BackgroundCheck) -> Trainer:
    """Wire the engine, the data, guards, checkpoints and callbacks of a run to a loop.

    Args:
        stop: set by a signal.
        data_check: this rank's comparison of the data with its manifest, in the background.

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
    kernel = engine.model.config.attention.kernel
    logger.info("attention kernel %s, compiled: %s", kernel, engine.compiled)
    topology = resolved.topology
    store = CheckpointStore(
        resolved.checkpoints, engine, resolved.ds_config, resolved.datasets.tokenizer_path
    )
    callbacks = _callbacks(run)
    # Guards, and what they report.
    incidents = IncidentLog(resolved.folder, run.loader, topology)
    # On every rank: each waits for its own batches.
    if (guard := recipe.guards.stalled_data) is not None:
        wait = run.loader.prefetch_wait
        wait.watch(guard.warn_seconds, guard.stop_seconds, incidents.report_stall)
    guards = GuardPolicy(recipe.guards, engine, incidents)
    # Measurements share one clock, which does not run during validation and saving.
    own_time = OwnTime(topology, timing_interval(recipe.logging))
    timer = StepTimer(own_time.step)
    writer = RecordWriter(resolved.timeline, run.loader, callbacks)
    metrics = _metrics(run, guards, writer, timer, own_time)
    validator: Validator | None = None
    if run.held_out is not None:
        validator = Validator(run.held_out, engine, run.loader, recipe.validation, writer, timer)
    # Shared by the loop, which asks it, and by checkpoints, which wait for the data check.
    stopping = Stopping(stop, data_check, store.thread, topology)
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


def _metrics(
    run: Run, guards: GuardPolicy, writer: RecordWriter, timer: StepTimer, own_time: OwnTime
) -> MetricsRecorder:
    resolved = run.resolved
    recipe = resolved.recipe
    # One account of the run's time, on the rank that writes.
    folder = resolved.folder if resolved.topology.is_main else None
    return MetricsRecorder(
        engine=run.engine,
        loader=run.loader,
        guards=guards,
        writer=writer,
        timer=timer,
        model=recipe.model,
        config=recipe.logging,
        peak_flops=peak_flops(resolved.topology.device, resolved.precision),
        goodput=GoodputMeter(folder, timer, run.loader.prefetch_wait),
        own_time=own_time,
        hardware=HardwareMeter(folder, resolved.topology),
    )


def _callbacks(run: Run) -> CallbackList:
    """Return the callbacks of this rank: all of them on rank 0, none on any other."""
    resolved = run.resolved
    if not resolved.topology.is_main:
        return CallbackList([])
    callbacks = make_callbacks(
        resolved.recipe,
        resolved.timeline,
        resolved.ds_config,
        run.engine,
        validates=run.held_out is not None,
        checkpoints=resolved.checkpoints,
        usage=resolved.folder / USAGE,
    )
    return CallbackList(callbacks)


def _fingerprint(resolved: ResolvedRun, zero_stage: int) -> Fingerprint:
    return {
        "tokenizer_sha256": resolved.datasets.tokenizer.sha256,
        "world_size": resolved.topology.world_size,
        "ep_size": resolved.topology.ep_size,
        "sp_size": resolved.topology.sp_size,
        "tp_size": resolved.topology.tp_size,
        "zero_stage": zero_stage,
    }


def _card_facts(resolved: ResolvedRun) -> CardFacts:
    # Parameters do not depend on the length, FLOPs do.
    size = model_size(resolved.recipe.model, resolved.recipe.train.sequence_length)
    sources = resolved.datasets.training_sources()
    return {
        "parameters": {"total": size.parameters_total, "active": size.parameters_active},
        "sources": {
            name: {
                "kind": source.kind,
                "documents": source.documents,
                "tokens": source.tokens,
                "share": source.share,
            }
            for name, source in sources.items()
        },
    }
