"""What the ledger says of a start of a run."""

from __future__ import annotations

import hashlib
from importlib import metadata
from pathlib import Path

import data_pipeline
from data_pipeline.shards.manifest import canonical_sha256
from pretrain.callbacks.environment import git_state
from pretrain.checkpoint.layout import MANIFEST
from pretrain.checkpoint.ledger import Ledger, Origin, SegmentFacts
from pretrain.config.load import recipe_to_yaml
from pretrain.core.files import JsonObject, file_sha256
from pretrain.core.shipped import PACKAGE
from pretrain.run.build import ResolvedRun
from pretrain.training.trainer import Trainer


def code_version() -> JsonObject:
    """Return the package's version, its git commit if there is one, and a hash of its sources."""
    try:
        version = metadata.version("moe-pretrain")
    except metadata.PackageNotFoundError:
        version = "unknown"
    found: JsonObject = {"version": version, "sources": sources_sha256()}
    if (state := git_state(Path(__file__).resolve())) is not None:
        found |= {"commit": state["commit"], "dirty": state.get("dirty", False)}
    return found


def sources_sha256() -> str:
    """Return one hash over the names and contents of all Python files of both packages."""
    found = hashlib.sha256()
    for package in (PACKAGE, Path(data_pipeline.__path__[0])):
        for path in sorted(package.rglob("*.py")):
            content = path.read_bytes()
            name = path.relative_to(package.parent).as_posix()
            found.update(f"{name}\0{len(content)}\0".encode())
            found.update(content)
    return found.hexdigest()


def origin_of_run(resolved: ResolvedRun, continued: Path | None) -> Origin:
    """Return where a start of a run continues.

    Args:
        continued: the checkpoint that was loaded; None for a new run.
    """
    if continued is None:
        weights = resolved.recipe.initial_weights
        return {"kind": "new"} if weights is None else {"kind": "new", "path": weights}
    manifest = file_sha256(continued / MANIFEST)
    if continued.parent.resolve() == resolved.checkpoints.resolve():
        return {"kind": "checkpoint", "manifest": manifest}
    return {"kind": "branch", "manifest": manifest, "path": str(continued)}


def open_ledger(trainer: Trainer, resolved: ResolvedRun, continued: Path | None) -> None:
    """Record the start of a training on rank 0, and from now on its checkpoints.

    A finished run, which trains nothing more, gets no record.

    Args:
        continued: the checkpoint that was loaded; None for a new run.
    """
    topology = resolved.topology
    if not topology.is_main or trainer.is_done:
        return
    fingerprints = {
        name: manifest.fingerprint for name, manifest in resolved.datasets.manifests.items()
    }
    facts: SegmentFacts = {
        "code": code_version(),
        "data": canonical_sha256(fingerprints),
        "recipe": hashlib.sha256(recipe_to_yaml(resolved.recipe).encode()).hexdigest(),
        "world_size": topology.world_size,
        "ep_size": topology.ep_size,
        "sp_size": topology.sp_size,
        "tp_size": topology.tp_size,
        "zero_stage": trainer.engine.zero_stage,
    }
    ledger = Ledger(resolved.folder)
    ledger.start(trainer.progress.step, origin_of_run(resolved, continued), facts)
    trainer.checkpoints.store.ledger = ledger
