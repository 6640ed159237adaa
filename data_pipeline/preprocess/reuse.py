"""Whether data that are there already are those that a build would make."""

from __future__ import annotations

from data_pipeline.preprocess import manifest_writer
from data_pipeline.preprocess.plan import BuildPlan
from data_pipeline.preprocess.pool import Pool
from data_pipeline.preprocess.reader import Task
from data_pipeline.preprocess.units import collect
from data_pipeline.preprocess.worker import scan_unit
from data_pipeline.preprocess.workspace import Output
from data_pipeline.shards.manifest import Manifest, load_manifest, verify
from data_pipeline.shards.split import SplitPlan
from pretrain.core.errors import ConfigError


def matching_manifest(output: Output, plan: BuildPlan, pool: Pool, progress: bool) -> Manifest:
    """The manifest that is there, where it is of the same request and input.

    Files with other times may still have the same content: then they are read and compared. A
    stream is not read to its end for that.
    """
    manifest = load_manifest(output.path)
    if manifest.request_sha256 != plan.request_sha256:
        raise ConfigError(
            f"{output.path} holds data of another corpus, tokenizer or cleaning: choose another"
            " folder, or pass --fresh to replace it"
        )
    if manifest.inputs_sha256 != plan.inputs_sha256:
        other = ConfigError(
            f"{output.path} holds data of another corpus: choose another folder, or pass --fresh to"
            " replace it"
        )
        if plan.config.streaming:
            raise other
        task = Task(plan.config, str(output.staging), SplitPlan(plan.config.validation_share))
        jobs = [(task, number, unit) for number, unit in enumerate(plan.units)]
        records = collect(pool.run(scan_unit, jobs), plan, "comparing", progress)
        found = {
            name: manifest_writer.source_sha256(records, name) for name in plan.config.named_sources
        }
        if found != {name: source.sha256 for name, source in manifest.sources.items()}:
            raise other
    verify(manifest)
    return manifest
