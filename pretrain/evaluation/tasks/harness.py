"""Tasks of lm-evaluation-harness (Gao et al. 2021) on checkpoints and Hugging Face folders."""

from __future__ import annotations

import difflib
import functools
import io
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import tqdm

from pretrain.checkpoint.tokenizer_files import ID_FIELDS
from pretrain.core.errors import ConfigError, DataError, PipelineError
from pretrain.evaluation.generation.generators import NativeGenerator, TransformersGenerator
from pretrain.evaluation.result import TaskMetrics
from pretrain.export.hf_open import quiet_libraries

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel

# Some tasks run what the model writes. This variable, which their metric in the package evaluate
# reads too, says that this machine may.
CODE_PERMISSION = "HF_ALLOW_CODE_EVAL"


def check_tasks(tasks: Sequence[str], include_path: Path | None = None) -> None:
    """Check that tasks can begin, without their data: minutes or days before they do.

    Raises:
        ConfigError: see :func:`run_tasks`.
    """
    quiet_libraries()
    _task_manager(list(tasks), include_path)


def run_tasks(
    opened: NativeGenerator | TransformersGenerator,
    tasks: Sequence[str],
    include_path: Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, TaskMetrics]:
    """Runs tasks; returns the metrics of each task and group.

    Metrics have the harness's names ("acc,none"), and their standard errors are among them. A
    Hugging Face folder is run by the harness's own class. Texts are sampled as the task demands,
    whatever the folder's own defaults are.

    Args:
        include_path: folder of task files (YAML). If they define all of ``tasks``, the harness's
            own list, which takes long to read, is left out.
        num_fewshot: examples before each question; the task's own number by default.
        limit: documents of each task, from its first one.

    Raises:
        ConfigError: for an unknown task, and for one that runs the model's code where
            ``HF_ALLOW_CODE_EVAL`` is not 1.
        DataError: if a task's data cannot be read; the harness's own tasks download theirs.
    """
    quiet_libraries()
    import datasets
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    datasets.disable_progress_bars()
    manager = _task_manager(list(tasks), include_path)
    if isinstance(opened, NativeGenerator):
        from pretrain.evaluation.tasks.harness_model import NativeHarnessModel

        model: Any = NativeHarnessModel(opened, batch_size)
    else:
        _forget_sampling_defaults(opened.model)
        model = HFLM(
            pretrained=opened.model,
            tokenizer=opened.tokenizer,
            batch_size=batch_size,
            device=str(opened.device),
        )
    with _without_asides(), _permission_as_a_sentence():
        results = simple_evaluate(
            model=model,
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            log_samples=False,
            bootstrap_iters=1000,
            task_manager=manager,
            confirm_run_unsafe_code=_may_run_code(),
        )
    assert results is not None
    found = {**results["results"], **results.get("groups", {})}
    return {
        task: {
            name: _plain(value) for name, value in metrics.items() if name not in ("alias", "name")
        }
        for task, metrics in found.items()
    }


def _forget_sampling_defaults(model: PreTrainedModel) -> None:
    """Drops the sampling defaults of ``generation_config.json``, but the tokens that end a text.

    A repetition penalty there would change greedy texts too.
    """
    from transformers import GenerationConfig

    if (defaults := model.generation_config) is not None:
        model.generation_config = GenerationConfig(
            **{field: getattr(defaults, field) for field in ID_FIELDS}
        )


@contextmanager
def _without_asides() -> Iterator[None]:
    """Silences what the harness prints to standard output, and its progress bars without a name.

    With ``--json -`` standard output must be JSON and nothing else.
    """
    import lm_eval.api.task

    # Its metrics import tqdm when they are called, so the package's own name is replaced too.
    # Modules that run the model have imported theirs before: those bars are named and stay.
    with redirect_stdout(io.StringIO()), _silent_bars(tqdm, lm_eval.api.task):
        yield


@contextmanager
def _permission_as_a_sentence() -> Iterator[None]:
    """Give the harness's refusal of a task that runs code the form of every other error."""
    try:
        yield
    except ValueError as error:
        if found := re.search(r"run task: (\S+) which is marked as unsafe", str(error)):
            raise ConfigError(_forbidden(found[1])) from None
        raise


@contextmanager
def _silent_bars(*modules: ModuleType) -> Iterator[None]:
    """Replaces ``tqdm`` in each module by one that shows nothing; the harness has no option."""
    names = [vars(module) for module in modules]
    originals = [name["tqdm"] for name in names]
    silent = functools.partial(tqdm.tqdm, disable=True)
    for name in names:
        name["tqdm"] = silent
    try:
        yield
    finally:
        for name, original in zip(names, originals, strict=True):
            name["tqdm"] = original


def _plain(value: Any) -> Any:
    """The value as a JSON number; "N/A", for a missing standard error, becomes None."""
    if value == "N/A":
        return None
    return value.item() if hasattr(value, "item") else value


def _task_manager(tasks: list[str], include_path: Path | None) -> TaskManager:
    from lm_eval.tasks import TaskManager

    class CheckedTaskManager(TaskManager):
        """A manager with one kind of error: data sets, files and the hub each raise their own."""

        def load(self, *arguments: Any, **named: Any) -> Any:
            try:
                return super().load(*arguments, **named)
            except PipelineError:
                raise
            except Exception as error:
                reason = " ".join(str(error).split())[:300] or type(error).__name__
                raise DataError(
                    f"the tasks {', '.join(tasks)} cannot be loaded ({reason}): look at their"
                    " data_files, or at the network"
                ) from None

    if include_path is not None and not include_path.is_dir():
        raise ConfigError(
            f"--include-path {include_path} is no folder: give the folder of the tasks' YAML files"
        )
    include = str(include_path) if include_path is not None else None
    if include is not None:
        manager = CheckedTaskManager(include_path=include, include_defaults=False)
        if set(tasks) <= set(manager.all_tasks):
            _refuse_forbidden_code(tasks, manager)
            return manager
    manager = CheckedTaskManager(include_path=include)
    for task in tasks:
        if not manager.match_tasks([task]):
            near = difflib.get_close_matches(task, manager.all_tasks, n=3, cutoff=0.5)
            hint = f"there are {', '.join(near)}" if near else "list them with `lm-eval ls tasks`"
            raise ConfigError(
                f"--tasks: there is no task '{task}': {hint}, or give the folder of its YAML file"
                " with --include-path"
            )
    _refuse_forbidden_code(tasks, manager)
    return manager


def _may_run_code() -> bool:
    return os.environ.get(CODE_PERMISSION) == "1"


def _refuse_forbidden_code(tasks: list[str], manager: TaskManager) -> None:
    """Refuse a task that runs the model's code where that is not allowed."""
    for task in tasks if not _may_run_code() else ():
        # Tasks inside of groups are refused when the harness has loaded them.
        entry = manager.task_index.get(task)
        if entry is not None and (entry.cfg or {}).get("unsafe_code"):
            raise ConfigError(_forbidden(task))


def _forbidden(task: str) -> str:
    return (
        f"--tasks: the task {task} runs the code that the model writes: set {CODE_PERMISSION}=1"
        " where that may be, or leave the task out"
    )
