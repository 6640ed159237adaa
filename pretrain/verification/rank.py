"""One rank of a resume check: ``python -m pretrain.verification.rank JOB``.

It loads the checkpoint, saves it again elsewhere, and takes some steps. Guards, callbacks and the
run's folder have no part in it.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

import torch

from data_pipeline.loading.batch import Batch
from data_pipeline.loading.factory import open_loader
from data_pipeline.loading.interface import Loader
from data_pipeline.shards.datasets import data_folders, load_datasets
from data_pipeline.tokenizer.files import tokenizer_file
from pretrain.checkpoint import layout
from pretrain.checkpoint.optimizer_state import StoredStates
from pretrain.checkpoint.state import CheckpointState
from pretrain.checkpoint.state_hashes import state_hashes
from pretrain.checkpoint.store import CheckpointStore
from pretrain.checkpoint.tensor_files import TensorReader
from pretrain.checkpoint.weights import OPTIMIZER, files_of
from pretrain.config.loader_plan import loader_plan
from pretrain.config.recipe import Recipe
from pretrain.config.timeline import Timeline
from pretrain.core.errors import ConfigError, DataError, run_command
from pretrain.core.plugins import add_plugin_option
from pretrain.engine.ds_config import zero_stage_of
from pretrain.engine.engine import Engine
from pretrain.engine.precision import resolve_precision
from pretrain.engine.step import StepResult, reduce_steps
from pretrain.engine.topology import Topology, connect, disconnect
from pretrain.model.config import Dropout
from pretrain.run.build import share_cores
from pretrain.run.resolve import ResolvedConfig, resolve_config
from pretrain.training.schedules import schedules_of
from pretrain.verification.job import Job, Observed, recipe_for

THE_RUNS_DATA = "the run's own data"


def without_dropout(recipe: Recipe) -> Recipe:
    """Return a recipe without dropout: experts on other ranks would draw other values."""
    return recipe.model_copy(
        update={"model": recipe.model.model_copy(update={"dropout": Dropout()})}
    )


def resolve(job: Job) -> ResolvedConfig:
    """Return the configuration of a job, as a run of its topology has it.

    Raises:
        ConfigError: if the checkpoint's recipe cannot run there.
    """
    recipe = without_dropout(recipe_for(Path(job.checkpoint), job.overrides, job.layout))
    return resolve_config(
        recipe,
        job.ds_config,
        origin=job.origin,
        zero_stage=zero_stage_of(job.ds_config, job.origin),
        world_size=job.layout.world_size,
        choose_precision=resolve_precision,
        datasets=None,
    )


def open_data(
    job: Job, config: ResolvedConfig, state: CheckpointState, topology: Topology
) -> tuple[Loader | None, str]:
    """Return the run's batches from the checkpoint on, or None for random tokens, with a reason.

    Raises:
        DataError: if the data are there, and not those of the run.
    """
    if job.random_tokens:
        return None, "random tokens, as asked for"
    recipe = config.recipe
    step = state["step"]
    try:
        datasets = load_datasets(data_folders(recipe.data, recipe.data_path))
        plan = loader_plan(recipe, config.timeline)
        loader = open_loader(recipe.data, datasets, plan, topology.dp_rank, topology.dp_size)
    except DataError as error:
        return None, f"random tokens, because the run's data cannot be read: {error}"
    loader.resume(state["data"], step)
    try:
        loader.require(step + job.steps)
    except DataError:
        return None, "random tokens, because the run's data end before these steps"
    return loader, THE_RUNS_DATA


def random_batches(engine: Engine, step: int) -> list[Batch]:
    """Return this rank's micro batches of random tokens; the whole step is the same on any ranks.

    Each second token follows from the one before it, so that there is something to learn.
    """
    train = engine.phase_recipe.train
    vocab_size = engine.recipe.model.vocab_size
    assert vocab_size is not None
    generator = torch.Generator().manual_seed(1000 + step)
    shape = train.global_batch_size, train.sequence_length + 1
    tokens = torch.randint(0, vocab_size, shape, generator=generator)
    tokens[:, 1::2] = (tokens[:, :-1:2] * 7 + 3) % vocab_size
    inputs = tokens[:, :-1].contiguous().split(train.micro_batch_size)
    labels = tokens[:, 1:].contiguous().split(train.micro_batch_size)
    topology = engine.topology
    mine = range(topology.dp_rank, len(inputs), topology.dp_size)
    if not engine.recipe.data.document_mask:
        return [Batch(inputs[index], labels[index]) for index in mine]
    # One document a sample.
    return [Batch(inputs[index], labels[index], torch.zeros_like(inputs[index])) for index in mine]


def take_steps(
    job: Job, engine: Engine, timeline: Timeline, loader: Loader | None, first: int
) -> tuple[list[float], list[float]]:
    """Take steps from ``first`` on; return their losses and gradient norms."""
    schedules = schedules_of(engine.recipe, timeline)
    results: list[StepResult] = []
    for step in range(first, first + job.steps):
        engine.enter(timeline.at(step))
        # After the end of the run the last step's rates hold.
        factor, balance_rate = schedules.at(min(step, timeline.num_steps - 1))
        batches = random_batches(engine, step) if loader is None else loader.step_batches(step)
        results.append(engine.train_step(batches, factor, balance_rate))
    # One by one: the lengths of two phases make other router statistics.
    losses = [reduce_steps([result], engine.topology)[0][0].total for result in results]
    return losses, [result.grad_norm for result in results]


def saved_differences(job: Job, saved: Path) -> tuple[list[str], dict[str, float]]:
    """Compare a checkpoint that was saved again with the one it was loaded from.

    Returns:
        Names of tensors that differ, and the distances of 8-bit states that were quantised anew.
    """
    now = state_hashes(saved)
    names = list(dict.fromkeys((*job.hashes, *now)))
    differing = [name for name in names if now.get(name) != job.hashes.get(name)]
    if not differing:
        return [], {}
    before, after = (
        TensorReader(files_of(Path(folder), OPTIMIZER)) for folder in (job.checkpoint, saved)
    )
    states = StoredStates(before), StoredStates(after)
    requantized: dict[str, float] = {}
    for name in differing:
        if name not in before.names or name not in after.names:
            continue
        if before.form(name).dtype != torch.uint8:
            continue
        elements = before.form(name).elements
        old, new = (state.dequantized(name, 0, elements).values for state in states)
        largest = float(old.abs().max())
        requantized[name] = float((old - new).abs().max()) / largest if largest else 0.0
    return [name for name in differing if name not in requantized], requantized


def check(job: Job) -> None:
    """Do a job; every rank must call it, and rank 0 writes what was seen."""
    started = time.monotonic()
    checkpoint, folder = Path(job.checkpoint), Path(job.folder)
    config = resolve(job)
    share_cores()
    parallel = config.recipe.parallel
    topology = connect(parallel.ep_size, sp_size=parallel.sp_size, tp_size=parallel.tp_size)
    state = layout.read_state(checkpoint)
    loader, data = open_data(job, config, state, topology)
    # Ranks see the same files; one that does not would wait for others in vain.
    if len(set(topology.all_gather(data))) > 1:
        raise ConfigError("the ranks do not all see the run's data: pass --random-tokens")
    engine = Engine(config.recipe, config.ds_config, config.recipe.train.precision, topology)
    tokenizer = tokenizer_file(checkpoint)
    store = CheckpointStore(folder / "checkpoints", engine, config.ds_config, tokenizer)
    store.load(checkpoint)
    saved = store.save(state["step"], {"step": state["step"]})
    differing: list[str] = []
    requantized: dict[str, float] = {}
    if topology.is_main:
        differing, requantized = saved_differences(job, saved)
        # A second checkpoint of the other side needs the space.
        shutil.rmtree(saved)
    losses, norms = take_steps(job, engine, config.timeline, loader, state["step"])
    if topology.is_main:
        seconds = time.monotonic() - started
        Observed(differing, requantized, losses, norms, data, seconds).write(folder)
    topology.barrier()
    disconnect()


def main() -> None:
    """Read the command line, and do the job."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_plugin_option(parser)
    parser.add_argument("job", type=Path)
    check(Job.read(parser.parse_args().job))


if __name__ == "__main__":
    run_command(main)
