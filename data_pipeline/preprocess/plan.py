"""Plans a build before any text is read: sources, units and checksums.

By the checksums a later run recognises the same job.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from data_pipeline.cleaning import near_duplicates
from data_pipeline.config import DataConfig
from data_pipeline.shards.manifest import canonical_sha256
from data_pipeline.sources.files import identity_of, list_files, stamp_of
from data_pipeline.sources.interface import ReadContext, Source, Unit, open_source
from data_pipeline.tokenizer.tokenizer import Tokenizer
from pretrain.core.errors import ConfigError
from pretrain.core.files import JsonObject, file_sha256
from pretrain.core.registry import Component, kind_name

SMALLEST_UNIT = 16 << 20
LARGEST_UNIT = 1 << 30
UNITS_WANTED = 4096

# These say where data is and how training uses it; the shards do not depend on them.
NOT_IN_SHARDS = {
    "path",
    "corpora",
    "mixture",
    "packing",
    "order",
    "document_mask",
    "verify",
    "tokenizer",
    "max_bad_share",
    "on_bad",
    "streaming_lanes",
    "streaming_retries",
    "streaming_timeout_seconds",
    "shuffle_buffer_documents",
}


@dataclass(frozen=True)
class BuildPlan:
    """A build in units, in the order of its output.

    Attributes:
        request_sha256: of the configuration that decides what is written.
        inputs_sha256: of the units with their stamps.
        revisions: the version that was read of each source that has one, by the source's name.
    """

    config: DataConfig
    units: list[Unit]
    request_sha256: str
    inputs_sha256: str
    revisions: dict[str, str] = field(default_factory=dict)

    @property
    def input_bytes(self) -> int:
        """Bytes of all units, about."""
        return sum(unit.size for unit in self.units)

    def bytes_of_sources(self, numbers: Iterable[int]) -> dict[str, int]:
        """The bytes of these units, by source."""
        sizes = dict.fromkeys(self.config.named_sources, 0)
        for number in numbers:
            sizes[self.units[number].source] += self.units[number].size
        return sizes


def open_sources(config: DataConfig, spool_folder: Path) -> dict[str, Source]:
    """The sources of a recipe by name."""
    return {
        name: open_source(section, ReadContext.of(config, name, spool_folder))
        for name, section in config.named_sources.items()
    }


def request_sha256(config: DataConfig, given: Tokenizer | None) -> str:
    """Return a checksum of what was asked for; an existing tokenizer counts by its content."""
    tokenizer = config.tokenizer.model_dump(
        mode="json", exclude={"path", "name", "vocab_size"} if given else set()
    )
    # Data from before this field are those without it.
    if not tokenizer["parse_special_tokens"]:
        del tokenizer["parse_special_tokens"]
    content = config.model_dump(mode="json", exclude=NOT_IN_SHARDS)
    _remove_fetching(config, content)
    minhash = near_duplicates.algorithm() if config.cleaning.near_duplicates else None
    return canonical_sha256(
        content
        | {
            "tokenizer": tokenizer,
            "tokenizer_sha256": given.sha256 if given else None,
            "minhash": minhash,
        }
    )


def _remove_fetching(config: DataConfig, content: JsonObject) -> None:
    """Remove the fields of the sources that say only how their input is fetched."""
    sections = config.sources or ({"all": config.source} if config.source else {})
    dumped = content["sources"] or {"all": content["source"]}
    for name, section in sections.items():
        for field_name in section.fetching:
            dumped[name].pop(field_name, None)


def plugins_sha256(config: DataConfig) -> str | None:
    """Return a checksum of the modules of the plugins' kinds in a request; None without one."""
    sections: list[Component] = [
        *config.named_sources.values(),
        config.tokenizer,
        *config.cleaning.rules,
    ]
    names = {name for section in sections if _is_foreign(section) for name in _modules_of(section)}
    files = {name: getattr(sys.modules.get(name), "__file__", None) for name in names}
    # By the module's name, not its path: a package that was moved is still the same.
    sums = {
        name: file_sha256(Path(file))
        for name, file in files.items()
        if file and Path(file).exists()
    }
    return canonical_sha256(sums) if names else None


def _is_foreign(section: Component) -> bool:
    return type(section).__module__.partition(".")[0] != "data_pipeline"


def _modules_of(section: Component) -> set[str]:
    """The modules of a kind's section and of its implementation, which this imports."""
    found = section.implementing_class()
    # A decorator may hide where a function is defined, but the dotted path has its module.
    return {
        type(section).__module__,
        section.implementation.partition(":")[0],
        getattr(found, "__module__", ""),
    }


def plan_build(
    config: DataConfig, given: Tokenizer | None, sources: dict[str, Source]
) -> BuildPlan:
    """Lists the input and cuts it into units.

    Their size depends on the input alone, so any number of workers writes the same bytes.

    Raises:
        ConfigError: if two sources name the same file, or a kind of source lists units that cannot
            be read as they are.
        DataError: if a source has nothing to read.
    """
    units = _units(config, sources, config.unit_bytes or SMALLEST_UNIT)
    # The number of units is bounded: each costs a record and a message.
    wanted = sum(unit.size for unit in units) // UNITS_WANTED
    if config.unit_bytes is None and wanted > SMALLEST_UNIT:
        size = min(1 << (wanted - 1).bit_length(), LARGEST_UNIT)
        units = _units(config, sources, size)
    check_files(units)
    against = config.cleaning.decontaminate.against if config.cleaning.decontaminate else []
    evaluation = [stamp_of(path)[1] for path in list_files(against)]
    listed = [[unit.source, list(unit.files), unit.start, unit.end, unit.stamp] for unit in units]
    inputs = canonical_sha256({"units": listed, "evaluation": evaluation})
    revisions = {
        name: source.revision for name, source in sources.items() if source.revision is not None
    }
    return BuildPlan(config, units, request_sha256(config, given), inputs, revisions)


def _units(config: DataConfig, sources: dict[str, Source], unit_bytes: int) -> list[Unit]:
    """The units of all sources, each source's own ones and none of its input twice.

    Raises:
        ConfigError: if a kind of source lists other units.
    """
    units: list[Unit] = []
    for name, source in sources.items():
        found: Any = source.units(unit_bytes)
        # A plugin may also yield them, or return anything.
        listed: list[Unit] = list(found) if isinstance(found, Iterable) else [found]
        if fault := _fault_of(name, listed):
            kind = f"{type(source).__module__}.{type(source).__qualname__}"
            raise ConfigError(
                f"the units of the source '{name}', of kind"
                f" '{kind_name(type(config.named_sources[name]))}', cannot be used: {fault};"
                f" correct units() of {kind}"
            )
        units += listed
    return units


def _fault_of(name: str, units: list[Unit]) -> str | None:
    """Return what is wrong with the result of a source's ``units``; None if nothing is."""
    for unit in units:
        if not isinstance(unit, Unit):
            return f"{unit!r} is among them, which is no Unit"
        if unit.source != name:
            return f"one names the source {unit.source!r}, not its own (self.context.name)"
        if isinstance(unit.files, str) or not all(isinstance(path, str) for path in unit.files):
            return f"the files of one are {unit.files!r}, not a tuple of texts"
    # A source without files has only the ranges.
    ranges = sorted(
        (path, unit.start, float("inf") if unit.end is None else unit.end)
        for unit in units
        for path in unit.files or ("",)
        if unit.end is None or unit.start < unit.end
    )
    for (path, _, end), (next_path, start, _) in pairwise(ranges):
        if path == next_path and start < end:
            where = f"of {path} " if path else ""
            return f"they hold the part {where}from {start} on twice, so its text would be repeated"
    return None


def check_files(units: list[Unit]) -> None:
    """Raises :class:`ConfigError` if two sources read the same file, under whatever names."""
    if len({unit.source for unit in units}) == 1:
        return
    owners: dict[tuple[int, int], tuple[str, str]] = {}
    for source, path in dict.fromkeys((unit.source, path) for unit in units for path in unit.files):
        if not os.path.isfile(path):  # a data set's name
            continue
        owner, name = owners.setdefault(identity_of(path), (source, path))
        if owner != source:
            same = path if name == path else f"{path}, which is {name},"
            raise ConfigError(
                f"the file {same} is in two sources, '{owner}' and '{source}': name it in one of"
                " them, or its text is there twice"
            )
