"""From the command line to a finished run. What every launcher starts: ``launchers/pretrain.py``."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from data_pipeline.loading.mixture import check_names
from data_pipeline.loading.packing import Windows, prepare_packing
from data_pipeline.loading.shard_loader import loader_phases, open_loader
from data_pipeline.shards.datasets import Datasets, data_folders, load_datasets
from data_pipeline.shards.manifest import manifest_path
from data_pipeline.shards.verification import BackgroundCheck
from pretrain.callbacks.build import make_callbacks, missing_packages
from pretrain.checkpoint import layout
from pretrain.checkpoint.initialize_from import starting_weights
from pretrain.checkpoint.store import CheckpointStore
from pretrain.checkpoint.tokenizer_files import origin_of, read_side_files
from pretrain.config.load import load_recipe, recipe_to_yaml
from pretrain.config.recipe import Recipe
from pretrain.config.rules.sections import check_topology, warnings_about
from pretrain.config.timeline import Timeline
from pretrain.core.cli import add_json_option, add_recipe_options, command_parser, write_json
from pretrain.core.errors import (
    DONE,
    PREEMPTED,
    ConfigError,
    DataError,
    PeerLostError,
    PipelineError,
    is_peer_loss,
)
from pretrain.core.files import only_writer
from pretrain.core.signals import StopRequest
from pretrain.engine.determinism import be_deterministic
from pretrain.engine.ds_config import read_ds_config, resolve_ds_config, zero_stage_of
from pretrain.engine.engine import Engine
from pretrain.engine.precision import hardware_warnings, resolve_precision
from pretrain.engine.topology import connect, disconnect, world_size_from_environment
from pretrain.guards.incidents import INCIDENTS
from pretrain.model.sizes import model_size, peak_flops
from pretrain.run.dry_run import (
    add_estimate_options,
    hardware_of,
    make_plan,
    planned_precision,
    planned_start,
    planned_weights,
    print_plan,
)
from pretrain.run.folder import (
    CHECKPOINTS,
    ENDED,
    USAGE,
    check_branch,
    check_same_run,
    log_to_file,
    prints_to_log,
    read_summary,
    start_over,
    update_summary,
)
from pretrain.training.trainer import Trainer

logger = logging.getLogger(__name__)

OTHER_FOLDER = "choose another folder with --set run_path=FOLDER"
DEFAULT_DS_CONFIG = Path(__file__).resolve().parent.parent / "ds_configs" / "zero1.json"
EXAMPLES = """\
  deepspeed --num_accelerators 2 launchers/pretrain.py --ds_config ds_configs/zero1.json --recipe quickstart
  torchrun --nproc_per_node 8 launchers/pretrain.py --ds_config ds_configs/zero3.json --recipe moe_1b --set parallel.ep_size=8
  python launchers/pretrain.py --recipe debug --dry-run"""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(
        "Pretrains a model from a recipe. The same command again resumes; a finished run says so.",
        EXAMPLES,
    )
    add_recipe_options(parser)
    parser.add_argument(
        "--ds_config",
        "--ds-config",
        default=str(DEFAULT_DS_CONFIG),
        metavar="PATH",
        help="DeepSpeed's JSON (default: ds_configs/zero1.json of this project)",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="start over; refuses where the folder holds a run"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="with --fresh: delete the run that is there"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved configuration, sizes, memory and time, and stop",
    )
    parser.add_argument(
        "--world-size", type=int, metavar="N", help="with --dry-run: plan for N ranks"
    )
    add_estimate_options(parser)
    parser.add_argument(
        "--local_rank", type=int, help=argparse.SUPPRESS
    )  # the deepspeed launcher passes it; LOCAL_RANK says the same
    add_json_option(parser)
    return parser.parse_args(arguments)


def resolve_recipe(recipe: Recipe, precision: str, datasets: Datasets | None) -> Recipe:
    """Fills in what is left open: the number format, and the vocabulary's size from the data or, before there is any, from its plan.

    Raises:
        DataError: where the recipe's vocabulary is smaller than the tokenizer's.
    """
    planned = datasets.tokenizer.vocab_size if datasets else recipe.data.tokenizer.vocab_size
    vocab_size = recipe.model.vocab_size or planned
    if vocab_size is None:
        raise DataError(
            f"the vocabulary's size is not known before there is data in {recipe.data_path}: build it, or set model.vocab_size"
        )
    if datasets and vocab_size < datasets.tokenizer.vocab_size:
        raise DataError(
            f"model.vocab_size is {vocab_size}, but the tokenizer of {datasets.place} has "
            f"{datasets.tokenizer.vocab_size} entries: leave model.vocab_size out"
        )
    model = recipe.model.model_copy(update={"vocab_size": vocab_size})
    return recipe.model_copy(
        update={"model": model, "train": recipe.train.model_copy(update={"precision": precision})}
    )


def share_cores() -> None:
    """On a CPU, ranks of one machine share its cores evenly unless OMP_NUM_THREADS says otherwise."""
    if "OMP_NUM_THREADS" not in os.environ and not torch.cuda.is_available():
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))


def starts_as_first_rank() -> bool:
    """Whether the launcher made this process rank 0, also before the processes are connected; true without a launcher."""
    names = ("RANK", "SLURM_PROCID", "PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK")
    return next((os.environ[name] for name in names if name in os.environ), "0") == "0"


def plan_only(
    options: argparse.Namespace, recipe: Recipe, ds_config: dict[str, Any], stage: int
) -> int:
    world_size = options.world_size or max(
        world_size_from_environment(os.environ), recipe.parallel.ep_size
    )
    folders = data_folders(recipe)
    datasets = (
        load_datasets(folders)
        if all(manifest_path(folder).is_file() for folder in folders.values())
        else None
    )
    if datasets and not recipe.data.streaming:
        for phase in loader_phases(recipe):
            check_names(phase.mixture, list(datasets.training_parts()), phase.where)
    accumulation = check_topology(recipe, world_size, stage)
    hardware = hardware_of(options)
    precision = planned_precision(recipe.train.precision, hardware)
    first_step = planned_start(recipe)
    recipe = resolve_recipe(recipe, precision, datasets)
    resolved = resolve_ds_config(
        ds_config, options.ds_config, recipe, precision, accumulation, world_size
    )
    notes = planned_weights(recipe, datasets.tokenizer.sha256 if datasets else None)
    if starts_as_first_rank():
        plan = make_plan(
            recipe, resolved, precision, world_size, stage, first_step, notes, hardware
        )
        if options.json_path != "-":
            print_plan(plan, recipe)
        write_json(plan, options.json_path)
    return DONE


def build_trainer(
    recipe: Recipe,
    ds_config: dict[str, Any],
    datasets: Datasets,
    engine: Engine,
    stop: StopRequest,
    check: BackgroundCheck,
) -> Trainer:
    """Wires data, engine, checkpoints and callbacks."""
    topology, train, folder = engine.topology, recipe.train, Path(recipe.output_path)
    loader = open_loader(recipe, datasets, topology.rank, topology.world_size)
    held_out = datasets.validation_stream()
    validation = (
        Windows(held_out, train.sequence_length, datasets.pad_id, recipe.data.document_mask)
        if held_out
        else None
    )
    if recipe.guards.early_stopping is not None and validation is None:
        raise ConfigError(
            "guards.early_stopping looks at the validation loss, but the data has no validation split: build one, or leave it out"
        )
    store = CheckpointStore(folder / CHECKPOINTS, engine, ds_config, datasets.tokenizer_path)
    callbacks = (
        make_callbacks(
            recipe, ds_config, engine, validation is not None, folder / CHECKPOINTS, folder / USAGE
        )
        if topology.is_main
        else []
    )
    size = model_size(recipe.model, train.sequence_length)
    return Trainer(
        recipe=recipe,
        engine=engine,
        loader=loader,
        validation=validation,
        store=store,
        identity=identity_of(datasets, engine),
        facts={
            "parameters": {"total": size.parameters_total, "active": size.parameters_active},
            "sources": {
                name: asdict(source) for name, source in datasets.training_sources().items()
            },
        },
        callbacks=callbacks,
        stop=stop,
        peak=peak_flops(topology.device, engine.precision),
        data_check=check,
    )


def identity_of(datasets: Datasets, engine: Engine) -> dict[str, Any]:
    """What must be the same for a checkpoint to be resumed; the loader looks at the data itself."""
    return {
        "tokenizer_sha256": datasets.tokenizer.sha256,
        "world_size": engine.topology.world_size,
        "ep_size": engine.topology.ep_size,
        "zero_stage": engine.zero_stage,
    }


def summarize(trainer: Trainer, recipe: Recipe) -> dict[str, Any]:
    """The run in numbers, for summary.json."""
    size, progress = model_size(recipe.model, recipe.train.sequence_length), trainer.progress
    tokens = trainer.timeline.tokens_after(progress.step)
    return {
        "recipe": recipe.name,
        "train_tokens": tokens,
        "steps": progress.step,
        "tokens_per_second": tokens / progress.train_seconds if progress.train_seconds else None,
        "train_seconds": progress.train_seconds,
        "stall_seconds": trainer.loader.waiting.seconds,
        "parameters_total": size.parameters_total,
        "parameters_active": size.parameters_active,
        "validation_loss_in_training": progress.last_validation,
        "best_validation_loss": progress.best_validation,
        "best_step": progress.best_step,
        "skipped_steps": progress.skipped_steps,
        "skipped_tokens": progress.skipped_tokens,
        "rollbacks": progress.rollbacks,
        "stopped_early": progress.stopped_early,
        "checkpoint": str(Path(recipe.output_path) / CHECKPOINTS / layout.LATEST),
        "checkpoints": layout.pointers(Path(recipe.output_path) / CHECKPOINTS),
    }


def train(
    options: argparse.Namespace, recipe: Recipe, ds_config: dict[str, Any], stage: int
) -> int:
    datasets = load_datasets(data_folders(recipe))
    datasets.verify()
    accumulation = check_topology(recipe, world_size_from_environment(os.environ), stage)
    precision = resolve_precision(recipe.train.precision)
    recipe = resolve_recipe(recipe, precision, datasets)
    share_cores()
    if recipe.train.deterministic:
        be_deterministic()
    topology = connect(recipe.parallel.ep_size)
    folder = Path(recipe.output_path)
    resolved = resolve_ds_config(
        ds_config, options.ds_config, recipe, precision, accumulation, topology.world_size
    )
    with only_writer(folder, OTHER_FOLDER) if topology.is_main else contextlib.nullcontext():
        if options.fresh and topology.is_main:
            start_over(folder, options.overwrite, recipe)
        if topology.is_main:
            prepare_packing(datasets, recipe.data, Timeline(recipe).block_tokens, progress=True)
        topology.barrier()
        log_to_file(folder, topology.rank)
        check = datasets.check_blocks(recipe.data.verify, topology.rank, topology.world_size)
        stop = StopRequest()
        stop.install()
        fill = starting_weights(recipe, datasets.tokenizer.sha256, folder / CHECKPOINTS, topology)
        with prints_to_log():
            engine = Engine(recipe, resolved, precision, topology, fill)
            trainer = build_trainer(recipe, resolved, datasets, engine, stop, check)
            newest = trainer.store.newest()
            origin = origin_of(recipe, newest)
            trainer.store.side_files = {} if origin is None else read_side_files(origin)
            if newest is not None:
                check_same_run(
                    recipe,
                    layout.read_run_recipe(newest),
                    trainer.identity,
                    layout.read_state(newest),
                    folder,
                )
                trainer.resume(newest)
            elif recipe.branch_from is not None:
                trunk = trainer.store.whole(recipe.branch_from)
                check_branch(
                    recipe,
                    layout.read_run_recipe(trunk),
                    trainer.identity,
                    layout.read_state(trunk),
                    trunk,
                )
                trainer.resume(trunk)
            trainer.loader.require(trainer.num_steps)
            logger.info("recipe:\n%s", recipe_to_yaml(recipe))
            logger.info("ds_config: %s", json.dumps(resolved))
        return report(trainer, recipe, options)


def report(trainer: Trainer, recipe: Recipe, options: argparse.Namespace) -> int:
    """Trains, and tells the user on rank 0 what happened."""
    say = print if trainer.topology.is_main and options.json_path != "-" else (lambda *_: None)
    resumed_from, folder = trainer.progress.step, Path(recipe.output_path)
    done_already = resumed_from >= trainer.num_steps
    # A run that was killed between its last step and its end has only that to make up for.
    ended = done_already and read_summary(folder).get(ENDED) == resumed_from
    if resumed_from and not done_already:
        say(f"resuming from step {resumed_from} of {trainer.num_steps}")
    try:
        finished = ended or trainer.fit()
        summary = summarize(trainer, recipe) | {
            "resumed_from_step": resumed_from,
            "done_already": done_already,
        }
        if trainer.topology.is_main and not ended:
            end(trainer, folder, summary, finished)
    except Exception as error:
        fail(trainer, error)
        raise
    if done_already:
        more = (
            "guards.early_stopping.patience"
            if trainer.progress.stopped_early
            else "train.train_tokens"
        )
        say(
            f"done already: {folder} holds step {resumed_from} of {trainer.num_steps}; raise {more} to go on, or use --fresh to start over"
        )
    elif finished:
        loss = trainer.progress.last_validation
        if trainer.progress.stopped_early:
            say(
                f"stopped early: the validation loss has not fallen for {trainer.progress.stale_validations} validations"
            )
        if trainer.progress.skipped_steps:
            say(
                f"{trainer.progress.skipped_steps} of the steps were skipped, and their data not learned from: see {folder / INCIDENTS} and the log"
            )
        say(
            f"finished {summary['steps']:,} steps, {summary['train_tokens']:,} tokens at {summary['tokens_per_second']:,.0f} tokens/s; "
            f"{'no validation split' if loss is None else f'validation loss {loss:.4f}'}; everything is in {folder}"
        )
    else:
        say(
            f"stopped and saved at step {trainer.progress.step} of {trainer.num_steps}: the same command goes on from there"
        )
    if trainer.topology.is_main:
        write_json(summary, options.json_path)
    return DONE if finished else PREEMPTED


def end(trainer: Trainer, folder: Path, summary: dict[str, Any], finished: bool) -> None:
    """The run's summary, and what callbacks do at its end; they may wait for others, and be killed meanwhile."""
    whole = update_summary(folder, summary)
    for callback in trainer.callbacks:
        callback.on_end(whole)
    if finished:
        update_summary(folder, {ENDED: trainer.progress.step})


def fail(trainer: Trainer, error: Exception) -> None:
    """Tells callbacks of the error that ends the run; what goes wrong with them meanwhile does not take its place."""
    for callback in trainer.callbacks:
        try:
            callback.on_failure(error)
        except Exception:
            logger.exception("%s failed after the run had", type(callback).__name__)


def run(options: argparse.Namespace) -> int:
    recipe = load_recipe(options.recipe, options.overrides)
    for warning in (
        [*warnings_about(recipe), *hardware_warnings(recipe)] if starts_as_first_rank() else ()
    ):
        print(f"warning: {warning}", file=sys.stderr)
    ds_config = read_ds_config(options.ds_config)
    for warning in missing_packages(recipe, ds_config) if starts_as_first_rank() else ():
        print(f"warning: {warning}", file=sys.stderr)
    stage = zero_stage_of(ds_config, options.ds_config)
    if options.dry_run:
        return plan_only(options, recipe, ds_config, stage)
    try:
        code = train(options, recipe, ds_config, stage)
    except RuntimeError as error:
        if not is_peer_loss(error):
            raise
        logger.exception("another rank is gone")
        raise PeerLostError(
            "another rank has ended or cannot be reached; mend what it reports, then run the same command to go on from the last checkpoint"
        ) from None
    disconnect()
    return code


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        return run(options)
    except PipelineError:
        # Every rank meets the same error: rank 0 tells it, and its launcher ends the others before they repeat it.
        if not starts_as_first_rank():
            sys.stdout.flush()
            time.sleep(3.0)
        raise
