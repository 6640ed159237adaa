"""From the command line to a finished run; ``launchers/pretrain.py`` starts it."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time

from pretrain.callbacks.build import missing_packages
from pretrain.config.load import load_recipe
from pretrain.config.published import read_published
from pretrain.config.recipe import Recipe
from pretrain.config.rules.sections import warnings_about
from pretrain.core.cli import write_json
from pretrain.core.errors import DONE, PREEMPTED, PipelineError, is_peer_loss
from pretrain.core.files import JsonObject
from pretrain.core.signals import StopRequest
from pretrain.engine.ds_config import read_ds_config
from pretrain.engine.precision import hardware_warnings
from pretrain.engine.topology import (
    disconnect,
    end_without_peer,
    leave,
    rely_on_watchdog,
    starts_as_first_rank,
)
from pretrain.engine.workarounds.group_timeouts import wait_long_in_all_groups
from pretrain.run import build
from pretrain.run.arguments import parse_arguments
from pretrain.run.dry_run import plan_run
from pretrain.run.folder import log_configuration, log_to_file, owned_folder, prints_to_log
from pretrain.run.ledger import open_ledger
from pretrain.run.outcome import Outcome
from pretrain.run.resume import resume_if_possible
from pretrain.verification.self_test import is_due, self_test

logger = logging.getLogger(__name__)


def train(options: argparse.Namespace, recipe: Recipe, ds_config: JsonObject) -> int:
    """Train a recipe to its end, or until a signal asks to stop, and return the exit code."""
    resolved = build.resolve_run(recipe, ds_config, options.ds_config)
    topology = resolved.topology
    with owned_folder(resolved.recipe, topology.is_main, options.fresh, options.overwrite):
        build.pack_data(resolved)
        log_to_file(resolved.folder, topology.rank)
        data_check = build.check_data(resolved)
        stop = StopRequest()
        stop.install()
        weights = build.initial_weights(resolved, resolved.checkpoints)
        with prints_to_log():
            built = build.build_run(resolved, weights)
            # Before the resume: the reference starts from the same weights as the run.
            if options.self_test or is_due(resolved.recipe, topology.world_size):
                self_test(built.engine, resolved.timeline, weights)
            trainer = build.build_trainer(built, stop, data_check)
            wait_long_in_all_groups()
            continued = resume_if_possible(trainer, resolved)
            log_configuration(resolved.recipe, resolved.ds_config)
        outcome = Outcome(trainer, resolved.recipe, prints=options.json_path != "-")
        outcome.announce()
        open_ledger(trainer, resolved, continued)
        # Only now: reading a checkpoint may hold Python's lock for seconds.
        rely_on_watchdog(resolved.recipe.parallel.timeout_seconds)
        # Errors before this line are of the configuration: callbacks have not started yet.
        try:
            finished = outcome.has_ended or trainer.fit()
            summary = outcome.summary()
            if topology.is_main and not outcome.has_ended:
                outcome.complete(summary, finished)
        except Exception as error:
            outcome.fail(error)
            raise
        outcome.explain(summary, finished)
        if topology.is_main:
            write_json(summary.to_dict(), options.json_path)
    return DONE if finished else PREEMPTED


def run(options: argparse.Namespace) -> int:
    """Load recipe and ds_config, print warnings, and train or plan; return the exit code."""
    recipe = load_recipe(options.recipe, options.overrides)
    ds_config = read_ds_config(options.ds_config)
    if recipe.published is not None:
        # Read again when it is drawn: here a wrong file costs a second, at the end hours.
        read_published(recipe.published)
    if starts_as_first_rank(os.environ):
        warnings = [*warnings_about(recipe), *hardware_warnings(recipe)]
        for warning in [*warnings, *missing_packages(recipe, ds_config)]:
            print(f"warning: {warning}", file=sys.stderr)
    if options.dry_run:
        plan_run(options, recipe, ds_config)
        return DONE
    try:
        code = train(options, recipe, ds_config)
    except RuntimeError as error:
        if not is_peer_loss(error):
            raise
        end_without_peer(error)
    disconnect()
    return code


def main(arguments: list[str] | None = None) -> int:
    """Run the command, and return its exit code."""
    options = parse_arguments(arguments)
    try:
        return run(options)
    except BaseException as error:
        # The other ranks end too, with this sentence. Before anything that may take time.
        leave(" ".join(f"{type(error).__name__}: {error}".split())[:500])
        if not isinstance(error, PipelineError):
            raise
        # Every rank meets the same error. Rank 0 reports it, and its launcher ends the others
        # before they repeat the sentence.
        if not starts_as_first_rank(os.environ):
            sys.stdout.flush()
            time.sleep(3.0)
        raise
