"""Converts a checkpoint to DeepSpeed's universal format, which any topology can load.

The format has one file for each weight and each optimizer state.
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

from pretrain.checkpoint.group_options import group_options, restore_group_options
from pretrain.checkpoint.layout import DS_CONFIG, read_recipe
from pretrain.checkpoint.weights import open_weights
from pretrain.core.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

logger = logging.getLogger(__name__)

DEEPSPEED_TAG = "deepspeed"
UNIVERSAL_TAG = "universal"
UNIVERSAL_LATEST = "latest_universal"


def check_universal(checkpoint: Path) -> None:
    """Check that DeepSpeed's converter can convert a checkpoint.

    Raises:
        ConfigError: if it is known to fail, or there is nothing to convert.
    """
    stage = _zero_stage(checkpoint)
    recipe = read_recipe(checkpoint)
    model = recipe.model
    if stage is None or not (checkpoint / DEEPSPEED_TAG).is_dir():
        raise ConfigError(
            f"{checkpoint} holds weights alone, without DeepSpeed's optimizer states: "
            "convert a checkpoint of a run"
        )
    moe = model.moe
    if moe is None or not moe.has_universal_checkpoints or not model.routed_layers:
        kind = "a dense model"
        if moe is not None and not moe.has_universal_checkpoints:
            kind = f"model.moe.kind={moe.kind}"
        raise ConfigError(
            f"{kind} has no universal checkpoints, because DeepSpeed saves what its converter "
            "needs with dropless experts only: convert with --to safetensors"
        )
    if not recipe.optimizer.has_universal_checkpoints:
        raise ConfigError(
            f"optimizer.kind={recipe.optimizer.kind} has no universal checkpoints, because "
            "DeepSpeed's converter knows Adam's two moments only: convert with --to safetensors"
        )
    if stage == 0:
        raise ConfigError(
            "ZeRO stage 0 keeps whole optimizer states, which DeepSpeed's converter does not read: "
            "convert with --to safetensors"
        )


def write_universal(checkpoint: Path, folder: Path) -> tuple[int, int]:
    """Convert into a folder, with DeepSpeed's converter, and compare every weight bit for bit.

    The folder gets ``universal/`` and ``latest_universal``. Memory and time are the converter's.
    It unpickles DeepSpeed's files: give it checkpoints whose manifest was verified.

    Returns:
        The number of weights, and the bytes of all files.

    Raises:
        ConfigError: see :func:`check_universal`.
        CheckpointError: if the converter fails, or a weight is missing or differs from the
            checkpoint's.
    """
    # Importing it takes seconds.
    from deepspeed.checkpoint import ds_to_universal

    check_universal(checkpoint)
    target = folder / UNIVERSAL_TAG
    options = Namespace(
        input_folder=str(checkpoint / DEEPSPEED_TAG),
        output_folder=str(target),
        # With more workers the converter starts processes, which each import torch.
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )
    # The converter prints its progress; only a failure needs it.
    output = io.StringIO()
    try:
        with redirect_stdout(output), redirect_stderr(output):
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
        logger.error("DeepSpeed's converter printed:\n%s", output.getvalue())
        raise CheckpointError(
            f"DeepSpeed's converter fails on {checkpoint}: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}"
        ) from None
    (folder / UNIVERSAL_LATEST).write_text(UNIVERSAL_TAG, encoding="utf-8")
    count = _compare(checkpoint, target / "zero")
    return count, sum(path.stat().st_size for path in target.rglob("*") if path.is_file())


def load_universal(engine: DeepSpeedEngine, folder: Path) -> None:
    """Load what :func:`write_universal` made into an engine of any world size and ``ep_size``.

    The engine's ds_config must have ``"checkpoint": {"load_universal": true}``. Every rank must
    call it. It unpickles: load only what you made.

    Raises:
        CheckpointError: if ``folder`` is not a universal checkpoint.
    """
    if not (folder / UNIVERSAL_TAG / "zero").is_dir():
        raise CheckpointError(
            f"{folder} is no universal checkpoint: give a folder that "
            "tools/convert_checkpoint.py --to universal has written"
        )
    groups = engine.optimizer.optimizer.param_groups
    options = group_options(groups)
    engine.load_checkpoint(str(folder), tag=UNIVERSAL_TAG, load_lr_scheduler_states=False)
    # At ZeRO 3 DeepSpeed gives every group the options of the first one ...
    restore_group_options(groups, options)
    # ... and all weights one tensor as Adam's step, which each of them would then count up.
    for state in engine.optimizer.optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()
    _load_buffers(engine.module, folder / UNIVERSAL_TAG)


def _load_buffers(model: nn.Module, universal: Path) -> None:
    """Load buffers, such as balancing biases, which DeepSpeed's loading leaves as they are.

    They are in the file that each of the saving ranks wrote of its model.
    """
    path = min(universal.glob("*model_states.pt"))
    # Not weights_only: DeepSpeed's files hold instances of its classes.
    stored = torch.load(path, weights_only=False, map_location="cpu")["module"]
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name in stored:
                buffer.copy_(stored[name])


def _zero_stage(checkpoint: Path) -> int | None:
    path = checkpoint / DS_CONFIG
    if not path.is_file():
        return None
    ds_config = json.loads(path.read_text(encoding="utf-8"))
    return int(ds_config.get("zero_optimization", {}).get("stage", 0))


def _compare(checkpoint: Path, zero: Path) -> int:
    """Compare every weight bit for bit, and return how many there are."""
    weights = open_weights(checkpoint)
    count = 0
    for name in tqdm(weights.names, desc="comparing weights", unit="tensor"):
        if name.endswith("balance_bias"):  # a buffer: it is in DeepSpeed's model file
            continue
        path = zero / name / "fp32.pt"
        if not path.is_file():
            raise CheckpointError(f"DeepSpeed's converter left '{name}' out: nothing was published")
        # Not weights_only: DeepSpeed has just written it, with instances of its classes.
        content = torch.load(path, weights_only=False, map_location="cpu")
        # The file of a weight is a tensor or, with its concatenation dimension, a dictionary.
        found = content["param"] if isinstance(content, dict) else content
        expected = weights.read(name)
        if found.numel() != expected.numel() or not torch.equal(
            found.reshape(expected.shape).float(), expected
        ):
            raise CheckpointError(
                f"DeepSpeed's converter changed the values of '{name}': nothing was published"
            )
        count += 1
    return count
