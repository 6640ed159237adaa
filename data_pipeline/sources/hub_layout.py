"""Finds the files of a config and of a split, by the rules of the Hugging Face hub.

A README.md may declare configs with their files in YAML
(https://huggingface.co/docs/hub/datasets-manual-configuration); otherwise the names of folders and
files say the split (https://huggingface.co/docs/hub/datasets-file-names-and-splits).
"""

from __future__ import annotations

import glob
import os
import re
from typing import Any, NamedTuple

from data_pipeline.sources.file_kinds import files_of_kind
from data_pipeline.sources.files import one_line
from data_pipeline.sources.records import listed
from pretrain.core.errors import DataError
from pretrain.core.files import JsonObject

CARD = "README.md"
LARGEST_CARD_BYTES = 16 << 20
ALL = "all"
TRAIN = "train"
SPLIT_OF_WORD = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
# The hub's separators, and the = of split=test/ in partitioned folders.
SEPARATOR = r"[-._ =0-9]"
WORD = re.compile(
    rf"(?:^|{SEPARATOR})({'|'.join(sorted(SPLIT_OF_WORD, key=len, reverse=True))})(?=$|{SEPARATOR})"
)
SHARD = re.compile(r"data/([\w.]+)-\d{5}-of-\d{5}[^/]*\.[^/]*")


class Config(NamedTuple):
    """A config that a README.md declares.

    ``files`` are patterns by split; None: names below ``folder`` say the split.
    """

    name: str
    folder: str
    files: dict[str, list[str]] | None
    is_default: bool


class Splits(NamedTuple):
    """Files by split, and those whose names say none."""

    files: dict[str, list[str]]
    unnamed: list[str]

    def only(self, kind: str) -> Splits:
        """Return the files of one kind, without splits that have none."""
        kept = {split: files_of_kind(paths, kind) for split, paths in self.files.items()}
        return Splits(
            {split: paths for split, paths in kept.items() if paths},
            files_of_kind(self.unnamed, kind),
        )


def declared_configs(root: str) -> list[Config]:
    """Return the configs that a folder's README.md declares.

    Raises:
        DataError: if the declarations cannot be understood.
    """
    import yaml

    card = os.path.join(root, CARD)
    header = _front_matter(card)
    try:
        # Without guesses at types: a config may be called "no" or "2020".
        content = yaml.load(header, yaml.BaseLoader) if header else None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if "configs" not in header:
            return []
        problem = f"the YAML at the start of {card} cannot be read ({one_line(str(error))})"
        raise DataError(f"{problem}: correct it, or name the files with a pattern") from None
    declared = content.get("configs") if isinstance(content, dict) else None
    if not declared:
        return []
    try:
        return [_config(entry) for entry in declared]
    except (TypeError, KeyError, AttributeError, ValueError):
        raise DataError(
            f"'configs' at the start of {card} are not as the hub has them: correct them, or name"
            " the files with a pattern"
        ) from None


def has_front_matter(root: str) -> bool:
    """True for a folder whose README.md begins with YAML, as the card of a data set does."""
    return bool(_front_matter(os.path.join(root, CARD)))


def _front_matter(card: str) -> str:
    try:
        with open(card, encoding="utf-8", errors="replace") as stream:
            text = stream.read(LARGEST_CARD_BYTES)
    except OSError:
        return ""
    found = re.match(
        r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", text.removeprefix("\ufeff"), re.DOTALL
    )
    return found[1] if found else ""


def _config(entry: JsonObject) -> Config:
    files: dict[str, list[str]] | None = None
    declared = entry.get("data_files")
    if declared is not None:
        files = {}
        for item in declared if isinstance(declared, list) else [declared]:
            split, paths = (TRAIN, item) if isinstance(item, str) else (item["split"], item["path"])
            files.setdefault(_text(split), []).extend(
                _inside(path) for path in ([paths] if isinstance(paths, str) else paths)
            )
    return Config(
        _text(entry["config_name"]),
        _inside(entry.get("data_dir", "")),
        files,
        entry.get("default") in ("true", "True"),
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _inside(path: Any) -> str:
    if _text(path).startswith(("/", "~")) or "://" in path or ".." in path.split("/"):
        raise ValueError
    return str(path)


def choose_config(configs: list[Config], wanted: str | None, root: str) -> Config:
    """Return the config that is wanted, or the only one.

    Raises:
        DataError: if it is not clear which one is meant, or if there is no such config.
    """
    names = listed(config.name for config in configs)
    if wanted is not None:
        chosen = [config for config in configs if config.name == wanted]
        if not chosen:
            raise DataError(
                f"{root} has no config '{wanted}' (it has {names}): choose another with"
                " --dataset-config"
            )
    else:
        chosen = (
            configs
            if len(configs) == 1
            else [config for config in configs if config.is_default or config.name == "default"]
        )
    if len(chosen) != 1:
        raise DataError(f"{root} has several configs ({names}): choose one with --dataset-config")
    return chosen[0]


def declared_splits(root: str, config: Config) -> Splits:
    """Files of a config below ``root``, in the order of its patterns.

    Raises:
        DataError: for a pattern that matches nothing.
    """
    found: dict[str, list[str]] = {}
    for split, patterns in (config.files or {}).items():
        paths: dict[str, None] = {}
        for pattern in patterns:
            relative = os.path.join(config.folder, pattern)
            matches = sorted(
                path
                for path in glob.glob(relative, root_dir=root, recursive=True)
                if os.path.isfile(os.path.join(root, path))
            )
            if not matches:
                raise DataError(
                    f"{root}/{CARD} names the files {one_line(relative)}, which are not there:"
                    " fetch them, or name others with a pattern"
                )
            paths |= dict.fromkeys(matches)
        found[split] = list(paths)
    return Splits(found, [])


def splits_by_name(paths: list[str], has_titles: bool) -> Splits:
    """Splits by the names of folders, else of the file.

    Args:
        paths: below the folder, with ``/``.
        has_titles: of texts, which may have any. Then a word inside a name counts only if each file
            names a split, and not all the same.
    """
    splits = _splits_by_name(paths, False)
    return (
        _splits_by_name(paths, True)
        if has_titles and (splits.unnamed or len(splits.files) == 1)
        else splits
    )


def _splits_by_name(paths: list[str], only_plain: bool) -> Splits:
    """``only_plain``: a word counts only if it is the whole name."""
    splits: dict[str, list[str]] = {}
    unnamed: list[str] = []
    for path in paths:
        split = _split_of(path, only_plain)
        if split is None:
            unnamed.append(path)
        else:
            splits.setdefault(split, []).append(path)
    return Splits(splits, unnamed)


def _split_of(path: str, only_plain: bool) -> str | None:
    shard = SHARD.fullmatch(path)
    if shard:
        return shard[1]
    *folders, name = path.lower().split("/")
    for names in (folders, [name.partition(".")[0] if only_plain else name]):
        words = (
            [name for name in names if name in SPLIT_OF_WORD]
            if only_plain
            else [word for name in names for word in WORD.findall(name)]
        )
        found = {SPLIT_OF_WORD[word] for word in words}
        if found:
            return found.pop() if len(found) == 1 else None
    return None


def choose_split(splits: Splits, wanted: str | None, root: str) -> tuple[list[str], str]:
    """Return the files to read, and the name of their split.

    The name is empty if there are no splits.

    Raises:
        DataError: if it is not clear which files are meant.
    """
    files, unnamed = splits
    if wanted == ALL:
        return sorted({path for paths in files.values() for path in paths} | set(unnamed)), ""
    counts = listed(f"{name} ({_files(len(paths))})" for name, paths in files.items())
    if not files:
        if wanted not in (None, TRAIN):
            raise DataError(
                f"{root} has no split '{wanted}', since no name in it says a split: leave out"
                " --dataset-split"
            )
        return unnamed, ""
    if unnamed:
        raise DataError(
            f"{root} has the splits {counts}, and {_files(len(unnamed))} such as"
            f" {one_line(unnamed[0])} of none or of two: choose files with a pattern, or take all"
            " with --dataset-split all"
        )
    if wanted is not None:
        if wanted not in files:
            raise DataError(
                f"{root} has no split '{wanted}' (it has {counts}): choose another with"
                " --dataset-split"
            )
        return files[wanted], wanted
    if TRAIN in files:
        return files[TRAIN], TRAIN
    if len(files) == 1 and SPLIT_OF_WORD.get(next(iter(files)).lower()) in (None, TRAIN):
        return next(iter(files.values())), next(iter(files))
    raise DataError(
        f"{root} has no split 'train' (it has {counts}): choose one with --dataset-split, or take"
        " all with --dataset-split all"
    )


def _files(count: int) -> str:
    return f"{count} file{'s' if count != 1 else ''}"
