"""Folders as people have them: what kind of source one is, and which of its files are read."""

from __future__ import annotations

import os
import re
from collections import Counter

from data_pipeline.sources.config import CsvSource, FoldersBase, TextSource
from data_pipeline.sources.file_kinds import (
    ARCHIVE,
    CODE,
    CSV,
    DATA,
    JSON,
    JSONL,
    LABELS,
    OTHER,
    RECORDS,
    TSV,
    class_of,
    files_of_kind,
)
from data_pipeline.sources.files import list_files, one_line
from data_pipeline.sources.folder_walk import is_saved, refuse_pointers, say, snapshot_of, walk
from data_pipeline.sources.hub_layout import (
    Config,
    Splits,
    choose_config,
    choose_split,
    declared_configs,
    declared_splits,
    has_front_matter,
    splits_by_name,
)
from pretrain.core.errors import ConfigError, DataError

# More scripts than this at the top of a folder are a program, not what made or loads a data set.
MOST_SCRIPTS = 5
SHARD = re.compile(r"(.*?)(\d{5,})-of-(\d{5,})(.*)")


def files_of(config: FoldersBase) -> list[str]:
    """Return the files that ``input`` means.

    A folder stands for the files of the section's kind in it, sorted.

    Raises:
        DataError: for a folder that holds none, or several configs or splits of which none was
            chosen.
    """
    named: list[str] = []
    for pattern in config.input:
        root = os.path.expanduser(pattern)
        named += _files_of_folder(root, config) if os.path.isdir(root) else [pattern]
    files = list_files(named)
    refuse_pointers(files)
    return files


def kind_of_folder(folder: str, config: str | None) -> str:
    """Return what a folder is, by its files.

    A class of records, text, "source_code", or "datasets" for what save_to_disk wrote.

    Raises:
        ConfigError: for a folder that mixes kinds, or holds only unknown ones.
        DataError: for one without data.
    """
    root = snapshot_of(folder)
    if is_saved(root):
        return "datasets"
    files = walk(root)
    configs = declared_configs(root)
    if configs:
        splits = _declared(root, files, choose_config(configs, config, root), False)
        files = [path for paths in [*splits.files.values(), splits.unnamed] for path in paths]
    counts = Counter(map(class_of, files))
    if counts[CODE] and not configs:
        counts = _without_scripts(root, files, counts)
    if counts[CODE]:
        # JSON, text and the like belong to source code; records do not.
        data = [name for name in RECORDS if counts[name]]
        if not data:
            return "source_code"
        data.append(CODE)
    else:
        counts += Counter({JSONL: counts.pop(JSON, 0)})
        data = [name for name in DATA if counts[name]]
    if len(data) > 1:
        found = ", ".join(f"{counts[name]} of {LABELS[name]}" for name in data)
        options = " or ".join(
            f"--format {kind}" for kind in sorted({_format_of(name) for name in data})
        )
        raise ConfigError(
            f"{folder} holds files of several kinds ({found}): choose with {options}, or name the"
            " files with a pattern"
        )
    if not data:
        raise _nothing_there(folder, files)
    return data[0]


def _format_of(name: str) -> str:
    return {CODE: "source_code", TSV: "csv"}.get(name, name)


def _without_scripts(root: str, files: list[str], counts: Counter[str]) -> Counter[str]:
    """Return the counts without ignored files, and without the scripts of a data set."""
    from data_pipeline.sources.source_code import walk as walk_code

    ignored = set(walk_code(root, respect_gitignore=False)) - set(
        walk_code(root, respect_gitignore=True)
    )
    visible = [path for path in files if f"{root}/{path}" not in ignored]
    scripts = [path for path in visible if class_of(path) == CODE]
    if not scripts:
        return Counter({name: count for name, count in counts.items() if name != CODE})
    counts = Counter(map(class_of, visible))
    records = sum(counts[name] for name in (*RECORDS, *([JSON] if has_front_matter(root) else [])))
    if len(scripts) <= min(MOST_SCRIPTS, records) and not any("/" in path for path in scripts):
        del counts[CODE]
    return counts


def _nothing_there(folder: str, files: list[str]) -> ConfigError | DataError:
    if not files:
        return DataError(f"{folder} holds no files (hidden ones do not count): check the folder")
    for name, advice in (
        (ARCHIVE, "unpack them first"),
        (OTHER, "say what they are with --format text or --format source_code"),
    ):
        found = [path for path in files if class_of(path) == name]
        if found:
            kind = "archives" if name == ARCHIVE else "files of no known kind"
            return ConfigError(
                f"{folder} holds {len(found)} {kind}, such as {one_line(found[0])}: {advice}"
            )
    return DataError(
        f"{folder} holds no data, only {one_line(files[0])} and the like: check the folder, or name"
        " the files with a pattern"
    )


def _files_of_folder(folder: str, section: FoldersBase) -> list[str]:
    root = snapshot_of(folder)
    if is_saved(root):
        raise DataError(
            f"{folder} is what save_to_disk of the package datasets wrote: read it with --format"
            " datasets"
        )
    found = walk(root)
    kind = _class_read_by(section, found)
    has_titles = isinstance(section, TextSource) and section.document != "line"
    configs = declared_configs(root)
    description = ""
    if configs:
        config = choose_config(configs, section.config, root)
        splits = _declared(root, found, config, has_titles).only(kind)
        description = f"config {config.name}"
    elif section.config is not None:
        raise DataError(
            f"{root} declares no configs in its README.md: leave out --dataset-config, or give the"
            " folder of that part as --input"
        )
    else:
        splits = splits_by_name(files_of_kind(found, kind), has_titles)
    if not splits.files and not splits.unnamed:
        others = Counter(LABELS[class_of(path)] for path in found)
        holds = (
            ", ".join(f"{count} of {name}" for name, count in sorted(others.items())) or "nothing"
        )
        place = f"{folder} ({description})" if description else folder
        raise DataError(
            f"{place} holds no files of {LABELS[kind]} (the folder has {holds}): check the folder"
            " and --format"
        )
    chosen, split = choose_split(splits, section.dataset_split, root)
    description = ", ".join(
        part for part in (description, f"split {split}" if split else "") if part
    )
    _say_unread(folder, description, found, chosen, splits)
    return [os.path.join(root, path) for path in chosen]


def _class_read_by(section: FoldersBase, found: list[str]) -> str:
    if isinstance(section, CsvSource):
        return (
            TSV
            if section.delimiter == "\t" and any(class_of(path) == TSV for path in found)
            else CSV
        )
    return section.kind


def _declared(root: str, found: list[str], config: Config, has_titles: bool) -> Splits:
    """The files of a config that a README.md declares, by split."""
    if config.files is not None:
        return declared_splits(root, config)
    prefix = f"{config.folder.strip('/')}/" if config.folder.strip("/.") else ""
    below = [
        path.removeprefix(prefix)
        for path in found
        if path.startswith(prefix) and class_of(path) in DATA
    ]
    splits = splits_by_name(below, has_titles)
    return Splits(
        {split: [prefix + path for path in paths] for split, paths in splits.files.items()},
        [prefix + path for path in splits.unnamed],
    )


def _say_unread(
    folder: str, description: str, found: list[str], chosen: list[str], splits: Splits
) -> None:
    """Says once what of a folder is not read, and which shards are not there."""
    rest = sorted(set(found) - set(chosen))
    parts = []
    named = set(chosen)
    for split, paths in splits.files.items():
        others = set(paths) - named
        named |= others
        parts += [f"{len(others)} of split {split}"] if others else []
        shared = set(paths) & set(chosen)
        if shared and len(shared) < len(chosen):
            say(
                f"{folder}: of the files that are read ({description}) README.md names"
                f" {len(shared)} for the split {split} too"
            )
    if rest:
        parts += [
            f"{count} of {LABELS[name]}"
            for name, count in sorted(
                Counter(class_of(path) for path in rest if path not in named).items()
            )
        ]
        example = next((path for path in rest if path not in named), rest[0])
        read = (
            f"{len(chosen)} of {len(found)} files are"
            f" read{f' ({description})' if description else ''}"
        )
        say(f"{folder}: {read}; not read: {', '.join(parts)}, such as {one_line(example)}")
    shards: dict[tuple[str, str, str], set[str]] = {}
    for path in chosen:
        if shard := SHARD.fullmatch(path):
            shards.setdefault((shard[1], shard[3], shard[4]), set()).add(shard[2])
    for (before, total, after), numbers in sorted(shards.items()):
        if len(numbers) < int(total):
            say(
                f"{folder}: only {len(numbers)} of the {int(total)} shards"
                f" {before}*-of-{total}{after} are there, and those are read"
            )
