"""What is inside a checkpoint, and in what two checkpoints differ.

One tensor, or the experts of one layer, is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Literal, NotRequired, TypedDict

import torch
from torch import Tensor
from tqdm import tqdm

from pretrain.checkpoint.experts import moe_prefixes, read_experts, router_names, weight_similarity
from pretrain.checkpoint.layout import read_manifest, read_recipe, read_state
from pretrain.checkpoint.lazy_weights import StoredWeights
from pretrain.config.differences import dotted_fields
from pretrain.config.recipe import Recipe
from pretrain.core.errors import CheckpointError
from pretrain.core.files import JsonObject, file_sha256

Order = Literal["absolute", "relative", "cosine"]
# What of state.json a summary shows.
STATE_FIELDS = (
    "step",
    "consumed_tokens",
    "validation_loss",
    "world_size",
    "ep_size",
    "sp_size",
    "tp_size",
    "zero_stage",
    "tokenizer_sha256",
    "phase",
)


class FileReport(TypedDict):
    """A file that the manifest names.

    Attributes:
        bytes: that were found; None if it is missing.
        sha256: as it was saved.
        fault: None if everything is as it was saved.
    """

    name: str
    bytes: int | None
    sha256: str
    fault: str | None


class PairReport(TypedDict):
    """Two experts of a layer, and the cosine between all their weights."""

    experts: list[int]
    cosine: float


class LayerReport(TypedDict):
    """The experts of one MoE layer.

    Attributes:
        norms: Frobenius norms of each expert's tensors, by the tensor's name.
        router_norms: of each expert's part of the router matrix.
        balance_bias: of each expert; None without balancing by bias.
        most_alike, least_alike: pairs; None for a layer of one expert.
    """

    layer: int
    num_experts: int
    norms: dict[str, list[float]]
    router_norms: list[float]
    balance_bias: list[float] | None
    most_alike: PairReport | None
    least_alike: PairReport | None


class TensorDifference(TypedDict):
    """One tensor of two checkpoints: a ``fault``, or how far the two are apart, in fp32.

    Attributes:
        fault: missing in one, or of another shape; None if the tensors were compared.
        absolute: max |a - b|.
        relative: max |a - b| / max(|a|, |b|), element by element.
        cosine: 1 for equal tensors of zeros.
    """

    name: str
    fault: str | None
    absolute: NotRequired[float]
    relative: NotRequired[float]
    cosine: NotRequired[float]


class ComparisonReport(TypedDict):
    """Two checkpoints.

    Attributes:
        equal: how many tensors are equal.
        tensors: the largest differences first.
        recipe: dotted fields in which the recipes differ, with both values.
    """

    checkpoint: str
    other: str
    equal: int
    tensors: list[TensorDifference]
    recipe: dict[str, list[object]]


def inspect_checkpoint(folder: Path, verify: bool = False) -> JsonObject:
    """Return all that can be said of one checkpoint, as JSON has it.

    Args:
        verify: hash every file and compare with the manifest; else only sizes are compared.

    Raises:
        CheckpointError: if recipe, state, manifest or weights cannot be read.
    """
    recipe = read_recipe(folder)
    state = read_state(folder)
    files = file_table(folder, verify)
    # Only headers; expert_table reads tensors, one layer at a time.
    stored = StoredWeights(folder)
    return {
        "checkpoint": str(folder),
        **{name: state.get(name) for name in STATE_FIELDS},
        "parameters": sum(torch.Size(shape).numel() for shape in stored.shapes.values()),
        "bytes": sum(file["bytes"] or 0 for file in files),
        "files": files,
        "tensors": {name: list(shape) for name, shape in stored.shapes.items()},
        "recipe": recipe.model_dump(mode="json"),
        "experts": list(expert_table(stored, recipe)),
    }


def file_table(folder: Path, verify: bool) -> list[FileReport]:
    """Return a report on each file that the manifest names.

    Raises:
        CheckpointError: if there is no manifest, or it is none.
    """
    try:
        expected = read_manifest(folder)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}: choose another step_N folder") from None
    reports: list[FileReport] = []
    for name, entry in tqdm(
        sorted(expected.items()), desc="hashing", unit="file", disable=not verify
    ):
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        fault = None
        if found is None:
            fault = "is missing"
        elif found != entry["bytes"]:
            fault = f"has {found} bytes instead of {entry['bytes']}"
        elif verify and file_sha256(path) != entry["sha256"]:
            fault = "does not have the content that was saved"
        sha256 = entry["sha256"]
        reports.append({"name": name, "bytes": found, "sha256": sha256, "fault": fault})
    return reports


def expert_table(stored: StoredWeights, recipe: Recipe) -> Iterator[LayerReport]:
    """Yield a report on the experts of each MoE layer.

    Models whose experts are rows of tables (PEER) have none. Two experts are alike if their
    weights, taken as one vector, have a large cosine. Hidden units are not aligned, so experts that
    compute the same in another order are not alike.
    """
    model = recipe.model
    routing = model.routing
    if routing is None:
        return
    layers = list(zip(model.routed_layers, moe_prefixes(model), strict=True))
    for layer, prefix in tqdm(layers, desc="reading experts", unit="layer"):
        experts = read_experts(stored, prefix, model)
        names = router_names(prefix, routing)
        bias = next((stored[name] for name in names if name.endswith("balance_bias")), None)
        similarity_EE = weight_similarity(experts)
        # Sorted by cosine, so the extremes are the ends.
        pairs = sorted(
            (float(similarity_EE[first, second]), first, second)
            for first, second in combinations(range(len(experts)), 2)
        )
        yield {
            "layer": layer,
            "num_experts": len(experts),
            "norms": {
                name: [float(expert[name].norm()) for expert in experts] for name in experts[0]
            },
            "router_norms": stored[names[0]].norm(dim=1).tolist(),
            "balance_bias": None if bias is None else bias.tolist(),
            "most_alike": _pair(*pairs[-1]) if pairs else None,
            "least_alike": _pair(*pairs[0]) if pairs else None,
        }


def _pair(cosine: float, first: int, second: int) -> PairReport:
    return {"experts": [first, second], "cosine": cosine}


def compare_checkpoints(first: Path, second: Path, order: Order = "absolute") -> ComparisonReport:
    """Compare tensor by tensor, and the recipes field by field.

    Args:
        order: the measure by which the largest differences come first.

    Raises:
        CheckpointError: if either checkpoint cannot be read.
    """
    stores = StoredWeights(first), StoredWeights(second)
    names = sorted(stores[0].keys() | stores[1].keys())
    tensors = [_compared(*stores, name) for name in tqdm(names, desc="comparing", unit="tensor")]
    # The largest difference is the highest of the first two measures, and the lowest cosine.
    sign = 1 if order == "cosine" else -1
    # Tensors with a fault first, equal values in the order of their names.
    tensors.sort(
        key=lambda tensor: (
            tensor["fault"] is None,
            sign * tensor[order] if tensor["fault"] is None else 0,
            tensor["name"],
        )
    )
    one, other = (
        dotted_fields(read_recipe(folder).model_dump(mode="json")) for folder in (first, second)
    )
    fields = sorted(one.keys() | other.keys())
    return {
        "checkpoint": str(first),
        "other": str(second),
        "equal": sum(tensor["fault"] is None and tensor["absolute"] == 0 for tensor in tensors),
        "tensors": tensors,
        "recipe": {
            name: [one.get(name), other.get(name)]
            for name in fields
            if one.get(name) != other.get(name)
        },
    }


def _compared(first: StoredWeights, second: StoredWeights, name: str) -> TensorDifference:
    for store in (first, second):
        if name not in store:
            return {"name": name, "fault": f"missing in {store.folder}"}
    if first.shapes[name] != second.shapes[name]:
        shapes = f"{list(first.shapes[name])} and {list(second.shapes[name])}"
        return {"name": name, "fault": shapes}
    return _difference(name, first[name], second[name])


def _difference(name: str, a: Tensor, b: Tensor) -> TensorDifference:
    """Measure how far two fp32 tensors of one shape are apart."""
    difference = (a - b).abs()
    # tiny: two zeros are equal, and 0 / 0 is not.
    relative = difference / torch.maximum(a.abs(), b.abs()).clamp_min(torch.finfo(a.dtype).tiny)
    # fp64: a cosine of large tensors near 1 is all rounding in fp32.
    a, b = a.flatten().double(), b.flatten().double()
    norms = float(a.norm() * b.norm())
    cosine = float(a @ b) / norms if norms else float(torch.equal(a, b))
    return {
        "name": name,
        "fault": None,
        "absolute": float(difference.max()),
        "relative": float(relative.max()),
        "cosine": cosine,
    }
