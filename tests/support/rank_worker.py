"""One rank: runs many cases in one start of the processes, and writes their results as JSON lines.

Started with the name of a module of :mod:`tests.support.workers`, the file of cases and the file
for the results. The module's ``run_case(case)`` returns a result on every rank; that of rank 0 is
written.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import groups

from pretrain.config.recipe import Recipe
from pretrain.config.rules.sections import check_topology
from pretrain.engine.ds_config import resolve_ds_config
from pretrain.engine.engine import Engine
from pretrain.engine.precision import resolve_precision
from pretrain.engine.topology import connect, disconnect


def make_engine(
    recipe: Recipe, zero: int, sections: Mapping[str, Any] | None = None
) -> tuple[Engine, dict[str, Any]]:
    """The engine of a recipe at one ZeRO stage, and its resolved ds_config.

    ``sections`` are further sections of the ds_config.
    """
    forget_expert_groups()
    parallel = recipe.parallel
    topology = connect(parallel.ep_size, sp_size=parallel.sp_size, tp_size=parallel.tp_size)
    accumulation = check_topology(recipe, topology.world_size, zero)
    precision = resolve_precision(recipe.train.precision)
    ds_config = {"zero_optimization": {"stage": zero}, **(sections or {})}
    ds_config = resolve_ds_config(
        ds_config, "the case", recipe, precision, accumulation, topology.world_size
    )
    return Engine(recipe, ds_config, precision, topology), ds_config


def forget_expert_groups() -> None:
    """Lets the next engine have another ep_size: DeepSpeed never ends its expert groups."""
    groups._EXPERT_PARALLEL_GROUP, groups._EXPERT_DATA_PARALLEL_GROUP = {}, {}


def main() -> None:
    module, cases, results = sys.argv[1:]
    run_case = importlib.import_module(f"tests.support.workers.{module}").run_case
    torch.set_num_threads(1)
    for case in json.loads(Path(cases).read_text()):
        # The name in the log shows which case a rank was in when it failed.
        print(f"--- {case['name']}", flush=True)
        result = run_case(case)
        if torch.distributed.get_rank() == 0:
            with Path(results).open("a") as file:
                file.write(json.dumps(result) + "\n")
    disconnect()


if __name__ == "__main__":
    main()
