"""What every test gets: this checkout's code, quiet libraries, one thread, and shared fixtures."""

from __future__ import annotations

import os

import pytest

from pretrain.core.startup import quiet_libraries, same_products_at_any_address
from tests.support.paths import ROOT, TESTS

pytest_plugins = (
    "tests.support.data_fixtures",
    "tests.support.model_fixtures",
    "tests.support.run_fixtures",
)

# Files of more than a minute, the longest first: workers take files in this order, so that none is
# left alone with a long one at the end.
LONGEST_FIRST = (
    "integration/distributed/test_same_numbers_everywhere.py",
    "integration/data_pipeline/test_streamed_recipes.py",
    "integration/project/test_packaging.py",
    "integration/training/test_epochs.py",
    "integration/data_pipeline/test_source_kaggle.py",
    "integration/guards/test_rollback_learning_rate.py",
    "integration/data_pipeline/test_sentencepiece_run.py",
    "unit/data_pipeline/tokenizer/test_generated_documents.py",
    "unit/data_pipeline/loading/test_stream_lanes.py",
    "integration/evaluation/test_continuous_evaluation.py",
    "integration/faults/test_checkpoints.py",
    "integration/data_pipeline/test_preprocess_tool.py",
    "integration/distributed/test_option_pairs.py",
    "integration/training/test_plugins.py",
    "integration/distributed/test_small_recipes.py",
    "integration/launch/test_launchers.py",
    "integration/launch/test_quickstart.py",
    "integration/training/test_expert_usage_run.py",
    "integration/faults/test_phases_resume.py",
    "integration/guards/test_guarded_runs.py",
    "integration/sweeps/test_killed_ablation.py",
    "integration/sweeps/test_commands.py",
    "integration/export/test_megatron_core.py",
)

# Processes that tests start must import this checkout, whichever one the environment has installed.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
)
# Models here are tiny: more threads would only wait for each other, above all when two workers and
# the ranks they start share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
same_products_at_any_address()
quiet_libraries()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of the longest files first, all others in the order in which they are found.

    Tests of a GPU are skipped where there is none.
    """
    places = {TESTS / name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu and not _has_gpu():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="there is no CUDA device here"))


def _has_gpu() -> bool:
    # Imported for tests of a GPU alone: it takes seconds.
    import torch

    return torch.cuda.is_available()
