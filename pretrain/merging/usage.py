"""Measures experts on held-out text: how often each is chosen, and what they would output."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from data_pipeline.loading.batch import Batch
from data_pipeline.loading.packing import Windows
from data_pipeline.loading.validation import validation_batches
from pretrain.checkpoint.experts import Expert, routed_moe
from pretrain.checkpoint.weights import load_model
from pretrain.evaluation.checkpoint import load_matching_corpora
from pretrain.merging.publish import Scoring
from pretrain.model.config import Dropout, ModelConfig
from pretrain.model.decoder import DecoderLM

# Inputs of a layer on which its experts' outputs are compared.
KEPT_TOKENS = 1024


# Not inference mode, in which dropless layers do not report their routing.
@torch.no_grad()
def measure(
    checkpoint: Path, scoring: Scoring, keep_inputs: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """Runs the held-out windows through a checkpoint's model, as in evaluation.

    Args:
        keep_inputs: also return inputs of each MoE layer.

    Returns:
        How many tokens chose each expert, [L, E] fp64, in the order of
        :attr:`ModelConfig.routed_layers`; and for each of these layers up to 1024 of its inputs [T,
        D], from all windows, or nothing.

    Raises:
        ConfigError: if no layer has a router.
        DataError: if the data are missing or do not belong to the checkpoint.
    """
    datasets = load_matching_corpora(scoring.data, checkpoint)
    model, recipe = load_model(checkpoint, scoring.device)
    routed_moe(recipe.model)
    windows = Windows(
        datasets.stream(scoring.split),
        recipe.train.sequence_length,
        datasets.pad_id,
        recipe.data.document_mask,
    )
    count = min(windows.num_all, scoring.max_windows)
    inputs: list[list[Tensor]] = [[] for _ in recipe.model.routed_layers]
    share = -(-KEPT_TOKENS // max(count, 1))
    hooks = [
        layer.register_forward_hook(partial(_keep, kept, share))
        for layer, kept in zip(moe_layers(model), inputs, strict=True)
        if keep_inputs
    ]
    # One window a batch: a batch filled up with empty windows would count their padding.
    batches = tqdm(
        validation_batches(windows, 1, 0, 1, count),
        total=count,
        desc="measuring experts",
        unit="window",
    )
    model.config = model.config.model_copy(update={"dropout": Dropout()})
    counts = torch.stack([_counts(model, batch.to(scoring.device)) for batch in batches]).sum(dim=0)
    for hook in hooks:
        hook.remove()
    return counts, [torch.cat(kept)[:KEPT_TOKENS] for kept in inputs if kept]


def moe_layers(model: DecoderLM) -> list[nn.Module]:
    """The MoE layers, in the order of :attr:`ModelConfig.routed_layers`."""
    blocks = [*model.layers, *([model.multi_token.block] if model.multi_token is not None else [])]
    return [block.feed_forward for block in blocks if block.is_moe]


def _counts(model: DecoderLM, batch: Batch) -> Tensor:
    # The block of multi-token prediction runs in training only. The flag is set on the model alone:
    # the modules below stay in evaluation mode, without noise.
    model.training = model.multi_token is not None
    output = model(
        batch.input_ids_BS,
        batch.labels_BS,
        1.0,
        batch.document_ids_BS,
        position_ids_BS=batch.position_ids_BS,
    )
    model.training = False
    counts_LE: Tensor = output.router.counts_LE
    return counts_LE.double().cpu()


def _keep(
    kept: list[Tensor], share: int, layer: nn.Module, arguments: tuple[Any, ...], output: Any
) -> None:
    """A hook that keeps ``share`` inputs spread over the window."""
    x_TD = arguments[0].reshape(-1, arguments[0].shape[-1])
    kept.append(x_TD[:: max(1, len(x_TD) // share)][:share].float().cpu())


@torch.no_grad()
def expert_outputs(experts: list[Expert], model: ModelConfig, x_TD: Tensor) -> Tensor:
    """The output of each expert for every input, [E, T, D] fp32."""
    return torch.stack([_expert_function(expert, model)(x_TD) for expert in experts])


def _expert_function(expert: Expert, model: ModelConfig) -> Callable[[Tensor], Tensor]:
    module = model.feed_forward.implementing_class()(
        model.feed_forward, model.hidden_size, routed_moe(model).moe_intermediate_size
    )
    module.load_state_dict(expert)
    return module
