"""What is inside a checkpoint, and in what two checkpoints differ; read a tensor, or a layer's
experts, at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from pretrain.checkpoint.experts import moe_prefixes, read_experts, router_names, weight_similarity
from pretrain.checkpoint.layout import MANIFEST, read_recipe, read_state
from pretrain.checkpoint.lazy_weights import StoredWeights
from pretrain.config.recipe import Recipe
from pretrain.core.errors import CheckpointError
from pretrain.core.files import file_sha256

Order = Literal["absolute", "relative", "cosine"]
# What of state.json a summary shows.
STATE_FIELDS = (
    "step",
    "consumed_tokens",
    "validation_loss",
    "world_size",
    "ep_size",
    "zero_stage",
    "tokenizer_sha256",
    "phase",
)


def inspect_checkpoint(folder: Path, verify: bool = False) -> dict[str, Any]:
    """Everything that can be said of one checkpoint, as JSON would hold it.

    Args:
        verify: hash every file and compare with the manifest; else only sizes are compared.

    Raises:
        CheckpointError: where recipe, state, manifest or weights cannot be read.
    """
    recipe, state, files = read_recipe(folder), read_state(folder), file_table(folder, verify)
    stored = StoredWeights(folder)
    tensors = {name: list(shape) for name, shape in stored.shapes.items()}
    return {
        "checkpoint": str(folder),
        **{name: state.get(name) for name in STATE_FIELDS},
        "parameters": sum(torch.Size(shape).numel() for shape in stored.shapes.values()),
        "bytes": sum(file["bytes"] or 0 for file in files),
        "files": files,
        "tensors": tensors,
        "recipe": recipe.model_dump(mode="json"),
        "experts": list(expert_table(stored, recipe)),
    }


def file_table(folder: Path, verify: bool) -> list[dict[str, Any]]:
    """Each file that the manifest names: ``bytes`` found, ``sha256`` as it was saved, and
    ``fault``, None where all is as it was saved.
    """
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {
            name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in entries.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(
            f"{folder / MANIFEST} is no manifest: the checkpoint is damaged, choose another"
        ) from None
    rows = []
    for name, (size, sha256) in tqdm(
        sorted(expected.items()), desc="hashing", unit="file", disable=not verify
    ):
        path, fault = folder / name, None
        found = path.stat().st_size if path.is_file() else None
        if found is None:
            fault = "is missing"
        elif found != size:
            fault = f"has {found} bytes instead of {size}"
        elif verify and file_sha256(path) != sha256:
            fault = "does not have the content that was saved"
        rows.append({"name": name, "bytes": found, "sha256": sha256, "fault": fault})
    return rows


def expert_table(stored: StoredWeights, recipe: Recipe) -> Iterator[dict[str, Any]]:
    """For each MoE layer: Frobenius norms of each expert's tensors and of its router row, balancing
    biases, and the most and the least alike pair.

    Models whose experts are rows of tables (PEER) have none. Alike are experts whose weights, taken
    as one vector, have a large cosine; hidden numbers are not aligned.
    """
    model, moe = recipe.model, recipe.model.routing
    if moe is None:
        return
    layers = list(zip(model.routed_layers, moe_prefixes(model), strict=True))
    for layer, prefix in tqdm(layers, desc="reading experts", unit="layer"):
        experts = read_experts(stored, prefix, model)
        names = router_names(prefix, moe)
        bias = next((stored[name] for name in names if name.endswith("balance_bias")), None)
        similarity_EE = weight_similarity(experts)
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
            "most_alike": _pair(pairs[-1]) if pairs else None,
            "least_alike": _pair(pairs[0]) if pairs else None,
        }


def _pair(pair: tuple[float, int, int]) -> dict[str, Any]:
    return {"experts": [pair[1], pair[2]], "cosine": pair[0]}


def compare_checkpoints(first: Path, second: Path, order: Order = "absolute") -> dict[str, Any]:
    """Tensor by tensor, the largest differences first, and the fields in which the recipes differ.

    A row has ``name`` and either ``fault`` (missing in one, or of another shape) or, in fp32,
    ``absolute``: max |a - b|; ``relative``: max |a - b| / max(|a|, |b|), number by number; and
    ``cosine``, which is 1 for equal tensors of zeros.

    Raises:
        CheckpointError: where either cannot be read.
    """
    stores = StoredWeights(first), StoredWeights(second)
    names = sorted(stores[0].keys() | stores[1].keys())
    rows = [_compared(*stores, name) for name in tqdm(names, desc="comparing", unit="tensor")]
    signs = {"absolute": -1, "relative": -1, "cosine": 1}
    rows.sort(
        key=lambda row: (
            row["fault"] is None,
            signs[order] * row[order] if row["fault"] is None else 0,
            row["name"],
        )
    )
    recipes = [_flat(read_recipe(folder).model_dump(mode="json")) for folder in (first, second)]
    fields = {
        name: [recipe.get(name) for recipe in recipes]
        for name in sorted(recipes[0].keys() | recipes[1].keys())
    }
    return {
        "checkpoint": str(first),
        "other": str(second),
        "equal": sum(row["fault"] is None and row["absolute"] == 0 for row in rows),
        "tensors": rows,
        "recipe": {name: values for name, values in fields.items() if values[0] != values[1]},
    }


def _compared(first: StoredWeights, second: StoredWeights, name: str) -> dict[str, Any]:
    for store in (first, second):
        if name not in store:
            return {"name": name, "fault": f"missing in {store.folder}"}
    if first.shapes[name] != second.shapes[name]:
        return {
            "name": name,
            "fault": f"{list(first.shapes[name])} and {list(second.shapes[name])}",
        }
    return {"name": name, "fault": None, **_differences(first[name], second[name])}


def _differences(a: Tensor, b: Tensor) -> dict[str, float]:
    difference = (a - b).abs()
    relative = difference / torch.maximum(a.abs(), b.abs()).clamp_min(torch.finfo(a.dtype).tiny)
    a, b = a.flatten().double(), b.flatten().double()
    norms = float(a.norm() * b.norm())
    cosine = float(a @ b) / norms if norms else float(torch.equal(a, b))
    return {
        "absolute": float(difference.max()),
        "relative": float(relative.max()),
        "cosine": cosine,
    }


def _flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in section.items():
        found |= (
            _flat(value, f"{prefix}{key}.")
            if isinstance(value, dict)
            else {f"{prefix}{key}": value}
        )
    return found
