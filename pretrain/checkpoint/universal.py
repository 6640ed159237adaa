"""DeepSpeed's universal format from a checkpoint: a file for each weight and optimizer state, which
any topology can load.
"""

from __future__ import annotations

import io
import json
import logging
from argparse import Namespace
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING

import torch
from torch import nn
from tqdm import tqdm

from pretrain.checkpoint.layout import DEEPSPEED_TAG, DS_CONFIG, read_recipe
from pretrain.checkpoint.weights import open_weights
from pretrain.core.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

logger = logging.getLogger(__name__)

UNIVERSAL_TAG, UNIVERSAL_LATEST = "universal", "latest_universal"


def check_universal(checkpoint: Path) -> None:
    """Raises :class:`ConfigError` where DeepSpeed's converter is known to fail or the checkpoint
    has nothing to convert.
    """
    stage = _zero_stage(checkpoint)
    recipe = read_recipe(checkpoint)
    model = recipe.model
    if stage is None or not (checkpoint / DEEPSPEED_TAG).is_dir():
        raise ConfigError(
            f"{checkpoint} holds weights alone, without DeepSpeed's optimizer states: convert a"
            " checkpoint of a run"
        )
    moe = model.moe
    if moe is None or not moe.has_universal_checkpoints or not model.routed_layers:
        sparse = moe is not None and not moe.has_universal_checkpoints
        kind = f"model.moe.kind={moe.kind}" if moe is not None and sparse else "a dense model"
        raise ConfigError(
            f"{kind} has no universal checkpoints, because DeepSpeed saves what its converter needs"
            " with dropless experts only: convert with --to safetensors"
        )
    if not recipe.optimizer.has_universal_checkpoints:
        raise ConfigError(
            f"optimizer.kind={recipe.optimizer.kind} has no universal checkpoints, because"
            " DeepSpeed's converter knows Adam's two moments only: convert with --to safetensors"
        )
    if stage == 0:
        raise ConfigError(
            "ZeRO stage 0 keeps whole optimizer states, which DeepSpeed's converter does not read:"
            " convert with --to safetensors"
        )


def write_universal(checkpoint: Path, folder: Path) -> tuple[int, int]:
    """Fills ``folder`` with ``universal/`` and ``latest_universal``, by DeepSpeed's own converter,
    and compares every weight bit for bit.

    Memory and time are the converter's. It unpickles DeepSpeed's files: give it checkpoints whose
    manifest was verified.

    Returns:
        the number of weights, and the bytes of all files.

    Raises:
        ConfigError: see :func:`check_universal`.
        CheckpointError: where the converter fails, or a weight is missing or another than in the
            checkpoint.
    """
    from deepspeed.checkpoint import ds_to_universal

    check_universal(checkpoint)
    target = folder / UNIVERSAL_TAG
    options = Namespace(
        input_folder=str(checkpoint / DEEPSPEED_TAG),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )
    said = io.StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(said):
            ds_to_universal.main(options)
    except (
        AssertionError,
        RuntimeError,
        KeyError,
        ValueError,
        OSError,
        EOFError,
        UnpicklingError,
    ) as error:
        logger.error("DeepSpeed's converter said:\n%s", said.getvalue())
        raise CheckpointError(
            f"DeepSpeed's converter fails on {checkpoint}: {type(error).__name__}:"
            f" {' '.join(str(error).split())[:300]}"
        ) from None
    (folder / UNIVERSAL_LATEST).write_text(UNIVERSAL_TAG, encoding="utf-8")
    count = _compare(checkpoint, target / "zero")
    return count, sum(path.stat().st_size for path in target.rglob("*") if path.is_file())


def load_universal(engine: DeepSpeedEngine, folder: Path) -> None:
    """Weights and optimizer states of what :func:`write_universal` made, into an engine of any
    number of ranks and any ``ep_size``.

    The engine's ds_config has ``"checkpoint": {"load_universal": true}``. Every rank must call it.
    It unpickles: load what you made.

    Raises:
        CheckpointError: where ``folder`` is none.
    """
    if not (folder / UNIVERSAL_TAG / "zero").is_dir():
        raise CheckpointError(
            f"{folder} is no universal checkpoint: give a folder that tools/convert_checkpoint.py"
            " --to universal has written"
        )
    groups = engine.optimizer.optimizer.param_groups
    own = [{name: value for name, value in group.items() if name != "params"} for group in groups]
    engine.load_checkpoint(str(folder), tag=UNIVERSAL_TAG, load_lr_scheduler_states=False)
    # At ZeRO 3 DeepSpeed gives every group the options of the first, and all weights one tensor as
    # Adam's step, which then counts too often.
    for group, options in zip(groups, own, strict=True):
        group.update(options)
    for state in engine.optimizer.optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()
    _load_buffers(engine.module, folder / UNIVERSAL_TAG)


def _load_buffers(model: nn.Module, universal: Path) -> None:
    """DeepSpeed leaves buffers, which balancing biases are, as they are; they lie in the file that
    each of the saving ranks wrote of its model.
    """
    path = min(universal.glob("*model_states.pt"))
    stored = torch.load(path, weights_only=False, map_location="cpu")[
        "module"
    ]  # written by DeepSpeed, with classes of its own
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name in stored:
                buffer.copy_(stored[name])


def _zero_stage(checkpoint: Path) -> int | None:
    path = checkpoint / DS_CONFIG
    if not path.is_file():
        return None
    return int(
        json.loads(path.read_text(encoding="utf-8")).get("zero_optimization", {}).get("stage", 0)
    )


def _compare(checkpoint: Path, zero: Path) -> int:
    weights, count = open_weights(checkpoint), 0
    for name in tqdm(weights.names, desc="comparing weights", unit="tensor"):
        if name.endswith("balance_bias"):  # a buffer: it is in DeepSpeed's model file
            continue
        path = zero / name / "fp32.pt"
        if not path.is_file():
            raise CheckpointError(f"DeepSpeed's converter left '{name}' out: nothing was published")
        content = torch.load(
            path, weights_only=False, map_location="cpu"
        )  # just written by DeepSpeed, with classes of its own
        found = content["param"] if isinstance(content, dict) else content
        expected = weights.read(name)
        if found.numel() != expected.numel() or not torch.equal(
            found.reshape(expected.shape).float(), expected
        ):
            raise CheckpointError(
                f"DeepSpeed's converter made other numbers of '{name}': nothing was published"
            )
        count += 1
    return count
