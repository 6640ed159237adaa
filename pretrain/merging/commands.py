"""The jobs of ``tools/merge_checkpoints.py``, a function each, which return the result as JSON."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor

from data_pipeline.shards.datasets import data_folders
from data_pipeline.tokenizer.files import tokenizer_file
from pretrain.checkpoint.comparison import check_same_function
from pretrain.checkpoint.experts import (
    cosines,
    moe_prefixes,
    read_experts,
    routed_moe,
    weight_similarity,
)
from pretrain.checkpoint.layout import complete_checkpoints, read_recipe, read_state
from pretrain.checkpoint.lazy_weights import StoredWeights
from pretrain.checkpoint.weights_only import write_weights_folder
from pretrain.config.differences import differences
from pretrain.config.recipe import Recipe
from pretrain.core.errors import CheckpointError, ConfigError
from pretrain.core.files import file_sha256
from pretrain.evaluation.checkpoint import whole_checkpoint
from pretrain.export.convert import export_safetensors
from pretrain.export.writer import parse_bytes
from pretrain.merging.assembly import RouterStart, check_overrides, derived_recipe, moe_recipe
from pretrain.merging.blend import blended_tensors, decay_rates, uniform_rates, weighted_rates
from pretrain.merging.branch_train_mix import check_branches, mixed_tensors
from pretrain.merging.fewer_experts import Clusters, folded, pruned, regrouped_tensors
from pretrain.merging.publish import Scoring, checked_folder
from pretrain.merging.usage import expert_outputs, measure
from pretrain.model.widths import initial_router_std


class ReducedLayer(TypedDict):
    """A layer with fewer experts.

    ``experts`` has the old experts that each new one is made of; ``usage`` has the share of the
    choices that each old expert got.
    """

    layer: int
    experts: Clusters
    usage: list[float]


class MergeResult(TypedDict, total=False):
    """What a job reports; each job has those keys that it knows.

    Losses are in nats a token on held-out text, before by checkpoint.
    """

    checkpoint: str
    checkpoints: list[str]
    output: str
    step: int
    dtype: str
    tensors: int
    bytes: int
    losses_before: dict[str, float]
    loss_after: float | None
    notes: list[str]
    layers: list[ReducedLayer]


def chosen_checkpoints(
    paths: Sequence[str] | None, run: Path | None, last: int | None
) -> list[Path]:
    """The checkpoints to merge: those in ``paths``, or the ``last`` ones of a run, oldest first.

    Raises:
        ConfigError: if both or neither are given, or the run has fewer than asked for.
        CheckpointError: if one is missing or damaged, or has another tokenizer than the first.
    """
    if (paths is None) == (run is None):
        raise ConfigError("give either --checkpoints or --run")
    if last is not None and (run is None or last < 1):
        raise ConfigError("--last takes a number from 1 up and belongs to --run")
    if run is not None:
        found = complete_checkpoints(run / "checkpoints" if (run / "checkpoints").is_dir() else run)
        if len(found) < (last or 1):
            raise ConfigError(
                f"{run} has {len(found)} complete checkpoints: train with a larger"
                " checkpoint.keep_last, or lower --last"
            )
        # Found newest first; a moving average needs the order of the training.
        paths = [str(folder) for folder in reversed(found[:last])]
    folders = [whole_checkpoint(path) for path in paths or []]
    tokenizers = [_tokenizer_of(folder) for folder in folders]
    for folder, tokenizer in zip(folders, tokenizers, strict=True):
        if tokenizer != tokenizers[0]:
            raise CheckpointError(
                f"{folder} has another tokenizer than {folders[0]} (sha256 {_begin(tokenizer)} and"
                f" {_begin(tokenizers[0])}), so that equal ids are other texts: give checkpoints of"
                " one tokenizer"
            )
    return folders


def _tokenizer_of(folder: Path) -> str | None:
    """The sha256 of a checkpoint's tokenizer, None if it has none.

    Raises:
        CheckpointError: if its tokenizer is not the one that its state names.
    """
    path = tokenizer_file(folder)
    named = read_state(folder).get("tokenizer_sha256")
    found = file_sha256(path) if path.is_file() else None
    # A folder of weights may have no tokenizer; then only the name in its state is known.
    if named is not None and found not in (None, named):
        raise CheckpointError(
            f"{path} is another tokenizer than the one that the checkpoint was trained with"
            f" ({_begin(named)}): put that one there"
        )
    return named or found


def _begin(sha256: str | None) -> str:
    return "of none" if sha256 is None else f"{sha256[:12]}..."


def rates_of(count: int, weights: Sequence[float] | None, decay: float | None) -> list[float]:
    """Rates for :func:`blend`, of ``weights`` or of ``decay``; a uniform mean without both.

    Raises:
        ConfigError: if there is not one weight for each checkpoint, or a value is out of range.
    """
    if weights is not None and len(weights) != count:
        raise ConfigError(
            f"there are {count} checkpoints and {len(weights)} weights: give one for each"
        )
    if weights is not None:
        return weighted_rates(weights)
    return uniform_rates(count) if decay is None else decay_rates(count, decay)


def blend(
    folders: Sequence[Path],
    output: Path,
    suffix: str,
    rates: Sequence[float],
    scoring: Scoring | None,
) -> MergeResult:
    """A weighted mean of checkpoints of one model; the recipe is the last one's."""
    recipes = [read_recipe(folder) for folder in folders]
    check_same_function([recipe.model for recipe in recipes], [str(folder) for folder in folders])
    stores = [StoredWeights(folder) for folder in folders]
    result = _publish(
        folders,
        output,
        derived_recipe(recipes[-1], suffix),
        blended_tensors(stores, rates),
        scoring,
    )
    others = zip(folders[:-1], recipes[:-1], strict=True)
    # Fields such as the dropout may differ between checkpoints of one function.
    result["notes"] = [
        f"{one.path} is {one.values[0]} in {folder} and {one.values[1]} in {folders[-1]}, whose"
        " recipe the result has; no weight depends on it"
        for folder, recipe in others
        for one in differences(recipe.model, recipes[-1].model)
    ]
    return result


def mix(
    folders: Sequence[Path],
    output: Path,
    top_k: int,
    router_std: float | None,
    seed: int,
    overrides: Sequence[str],
    scoring: Scoring | None,
) -> MergeResult:
    """Dense models of one shape as one mixture, with an expert for each; branch-train-mix.

    The recipe is that of the first model.
    """
    if len(folders) < 2:
        raise ConfigError(
            "one model makes no mixture: give several --checkpoints, or use tools/upcycle.py"
        )
    dense = read_recipe(folders[0])
    stores = [StoredWeights(folder) for folder in folders]
    moe = {
        "num_experts": len(folders),
        "top_k": top_k,
        "moe_intermediate_size": dense.model.intermediate_size or 1,
    }
    recipe = moe_recipe(dense, "-mixed", moe, overrides)
    check_branches(stores, recipe.model)
    std = initial_router_std(dense.model) if router_std is None else router_std
    return _publish(
        folders,
        output,
        recipe,
        mixed_tensors(stores, recipe.model, RouterStart(std, seed=seed)),
        scoring,
    )


def reduce_experts(
    checkpoint: str,
    output: Path,
    keep: int,
    similarity: str | None,
    overrides: Sequence[str],
    scoring: Scoring,
) -> MergeResult:
    """Fewer experts in each layer.

    Args:
        keep: experts that each layer has afterwards.
        similarity: None drops the least used experts; ``weights`` or ``outputs`` averages those
            that are most alike in it.
    """
    folder = whole_checkpoint(checkpoint)
    before = read_recipe(folder)
    stored = StoredWeights(folder)
    moe = routed_moe(before.model)
    suffix = "-pruned" if similarity is None else "-folded"
    smaller = moe.model_dump(mode="json") | {"num_experts": keep}
    # One pass over the held-out text measures the usage of all layers at once.
    usage_LE, inputs = measure(folder, scoring, keep_inputs=similarity == "outputs")
    clusters: list[Clusters] = []
    for index, prefix in enumerate(moe_prefixes(before.model)):
        if similarity is None:
            clusters.append(pruned(usage_LE[index], keep, moe))
            continue
        experts = read_experts(stored, prefix, before.model)
        alike = (
            weight_similarity(experts)
            if similarity == "weights"
            else cosines(list(expert_outputs(experts, before.model, inputs[index])))
        )
        clusters.append(folded(alike, keep, moe))
    after = derived_recipe(before, suffix, overrides, moe=smaller)
    check_overrides(before.model, after.model)
    result = _publish(
        [folder],
        output,
        after,
        regrouped_tensors(stored, before.model, after.model, clusters, usage_LE),
        scoring,
    )
    # Every layer with a router has chosen experts for each token: no sum is zero.
    shares_LE = usage_LE / usage_LE.sum(dim=1, keepdim=True)
    layers = zip(before.model.routed_layers, clusters, shares_LE.tolist(), strict=True)
    result["layers"] = [
        {"layer": layer, "experts": chosen, "usage": usage} for layer, chosen, usage in layers
    ]
    return result


def shards(checkpoint: str, output: Path, dtype: str, max_shard_size: str | None) -> MergeResult:
    """Plain safetensors with the experts of all ranks joined, next to recipe and tokenizer."""
    folder = whole_checkpoint(checkpoint)
    shard_bytes = sys.maxsize if max_shard_size is None else parse_bytes(max_shard_size)
    done = export_safetensors(
        folder, output, getattr(torch, dtype), overwrite=False, shard_bytes=shard_bytes
    )
    return {
        "checkpoint": str(folder),
        "output": str(output),
        "step": done.step,
        "dtype": done.dtype,
        "tensors": done.tensors,
        "bytes": done.bytes,
    }


def _publish(
    folders: Sequence[Path],
    output: Path,
    recipe: Recipe,
    tensors: Iterable[tuple[str, Tensor]],
    scoring: Scoring | None,
) -> MergeResult:
    """Scores the source models, writes the new one, scores it, and publishes its folder."""
    if scoring is not None and scoring.data is None:
        _check_same_data(folders)
    with checked_folder(output) as unchecked:
        before = (
            {str(folder): scoring.loss(folder) for folder in folders} if scoring is not None else {}
        )
        write_weights_folder(
            unchecked,
            recipe,
            tensors,
            tokenizer_file(folders[-1]),
            max(read_state(folder)["step"] for folder in folders),
        )
        after = scoring.loss(unchecked) if scoring is not None else None
        written = StoredWeights(unchecked)
        # Folders of weights are always fp32: 4 bytes an element.
        sizes = [4 * torch.Size(shape).numel() for shape in written.shapes.values()]
    result: MergeResult = {
        "checkpoints": [str(folder) for folder in folders],
        "output": str(output),
        "tensors": len(sizes),
        "bytes": sum(sizes),
    }
    if scoring is not None:
        result["losses_before"] = before
        result["loss_after"] = after
    return result


def _check_same_data(folders: Sequence[Path]) -> None:
    """Checks that the losses of the sources are on the same text, and so can be compared."""
    recipes = {folder: read_recipe(folder) for folder in folders}
    data = {
        folder: data_folders(recipe.data, recipe.data_path) for folder, recipe in recipes.items()
    }
    for folder in folders:
        if data[folder] != data[folders[0]]:
            raise ConfigError(
                f"{folder} and {folders[0]} were trained on different data: say with --data what to"
                " score them on, or give --no-score"
            )
