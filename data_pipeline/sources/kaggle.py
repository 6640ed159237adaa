"""Files of a Kaggle data set, which are read as the files that they are."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from data_pipeline.sources import kaggle_download
from data_pipeline.sources.config import (
    CsvSource,
    JsonlSource,
    KaggleSource,
    ParquetSource,
    SourceConfig,
    TextSource,
)
from data_pipeline.sources.file_kinds import (
    CSV,
    JSON,
    JSONL,
    LABELS,
    PARQUET,
    TEXT,
    TSV,
    class_of,
)
from data_pipeline.sources.files import one_line, stamp_of
from data_pipeline.sources.folder_walk import say
from data_pipeline.sources.interface import Document, LeftOut, Source, Unit, open_source
from pretrain.core.errors import ConfigError, DataError

FORMATS = {JSONL: "jsonl", JSON: "jsonl", CSV: "csv", TSV: "csv", PARQUET: "parquet", TEXT: "text"}
FIELDS = ("text_field", "id_field", "metadata_fields")
LOGIN = (
    "set KAGGLE_USERNAME and KAGGLE_KEY, or KAGGLE_API_TOKEN, in the environment, or put kaggle.json"
    " of your account's page into ~/.kaggle"
)


class Kaggle(Source[KaggleSource]):
    """A Kaggle data set.

    The client's cache (``KAGGLEHUB_CACHE``) keeps the files, and a version that is there is not
    fetched again. Without ``version`` the newest one is asked for, and the manifest names it.
    """

    def units(self, unit_bytes: int) -> list[Unit]:
        """Download the files, and return the units of all of them.

        Raises:
            ConfigError: if the client is not installed, or the account may not read the data set.
            DataError: if the data set or a file is not there, the network fails, or a file's format
                is not known.
        """
        config = self.config
        files, version = _downloaded(
            config.dataset,
            config.version,
            tuple(config.files),
            config.stall_seconds,
            config.attempts,
        )
        self.revision = None if version is None else str(version)
        if not files:
            raise DataError(
                f"no file of the Kaggle data set {config.dataset} fits"
                f" {', '.join(config.files) or 'the source'}: look at its page for the names"
            )
        by_format: dict[str, list[str]] = {}
        for file in files:
            if (form := self._format_of(file)) is not None:
                by_format.setdefault(form, []).append(file)
        if not by_format:
            raise DataError(
                f"no file of the Kaggle data set {config.dataset} has a known format"
                f" ({Path(files[0]).name}): name it with data.source.format"
            )
        self._say_unread(files)
        return [
            self._stamped(unit)
            for form, paths in by_format.items()
            for unit in self._reader(form, paths).units(unit_bytes)
        ]

    def path_of(self, file: str) -> str:
        """``<owner>/<name>/<path inside the data set>``, on every machine and of every version.

        ``data.split_root`` is about files of this machine, and does not count here.

        Raises:
            DataError: for a file that is in no folder of Kaggle's client.
        """
        inside = kaggle_download.path_inside(self.config.dataset, file)
        if inside is None:
            raise DataError(
                f"{file} is not in the cache of Kaggle's client ({kaggle_download.cache_folder()}),"
                " so it has no path to split by: set KAGGLEHUB_CACHE to the cache's folder"
            )
        return f"{self.config.dataset}/{inside}"

    def _stamped(self, unit: Unit) -> Unit:
        """A unit whose stamp names the version, which never changes once it is published.

        Times of change would be those of the download, and differ between machines.
        """
        if self.revision is None:
            return unit
        sizes = ";".join(str(stamp_of(file)[0]) for file in unit.files)
        return replace(unit, stamp=f"version {self.revision}:{sizes}")

    def _say_unread(self, files: tuple[str, ...]) -> None:
        """Says once which files of the data set are not read."""
        rest = [file for file in files if self._format_of(file) is None]
        if rest:
            counts = sorted(Counter(LABELS[class_of(file)] for file in rest).items())
            kinds = ", ".join(f"{count} of {label}" for label, count in counts)
            example = kaggle_download.path_inside(self.config.dataset, rest[0]) or rest[0]
            say(
                f"the Kaggle data set {self.config.dataset}: {len(files) - len(rest)} of"
                f" {len(files)} files are read; not read: {kinds}, such as {one_line(example)}"
            )

    def read(self, unit: Unit) -> Iterator[Document | LeftOut]:
        form = self._format_of(unit.files[0])
        assert form is not None
        reader = self._readers.get(form)
        if reader is None:
            reader = self._readers[form] = self._reader(form, list(unit.files))
        reader.notes = self.notes
        yield from reader.read(unit)
        self.lines_read = reader.lines_read

    @cached_property
    def _readers(self) -> dict[str, Source[Any]]:
        # One for each format: it reads any unit of its files.
        return {}

    def _format_of(self, file: str) -> str | None:
        """Return the format of a file; None for one that only accompanies the data."""
        return self.config.format or FORMATS.get(class_of(file))

    def _reader(self, form: str, files: list[str]) -> Source[Any]:
        config = self.config
        given: dict[str, Any] = {"input": files, "split": config.split}
        records = given | config.model_dump(include=set(FIELDS))
        sections: dict[str, SourceConfig] = {
            "jsonl": JsonlSource(kind="jsonl", encoding=config.encoding, **records),
            "csv": CsvSource(kind="csv", encoding=config.encoding, **records),
            "parquet": ParquetSource(kind="parquet", **records),
            "text": TextSource(kind="text", encoding=config.encoding, **given),
            "line": TextSource(kind="text", document="line", encoding=config.encoding, **given),
        }
        return open_source(sections[form], self.context)


@lru_cache(maxsize=64)
def _downloaded(
    dataset: str, version: int | None, files: tuple[str, ...], stall_seconds: float, attempts: int
) -> tuple[tuple[str, ...], int | None]:
    """Return the files on this disk, and the version that they are of.

    Once a process: a version that appears meanwhile is none of this build.
    """
    if importlib.util.find_spec("kagglehub") is None:
        raise ConfigError(
            "data.source.kind=kaggle needs Kaggle's client: install it with pip install kagglehub"
        )
    request = {
        "dataset": dataset,
        "version": version,
        "files": files,
        "stall_seconds": stall_seconds,
        "attempts": attempts,
    }
    # -P: the folder of the script has modules with names of other packages. Its progress bars are
    # on standard error.
    command = [sys.executable, "-P", kaggle_download.__file__, json.dumps(request)]
    environment = os.environ | {"KAGGLEHUB_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}
    with _only_download(dataset) as lock:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, env=environment, check=False, pass_fds=lock
        )
    try:
        result = json.loads(done.stdout)
    except ValueError:
        raise DataError(
            f"the download of the Kaggle data set {dataset} ended with exit code"
            f" {done.returncode}: run the same command again"
        ) from None
    if "error" in result:
        raise _sentence(dataset, version, files, result["error"], result["status"], stall_seconds)
    return tuple(result["files"]), result["version"]


@contextmanager
def _only_download(dataset: str) -> Iterator[tuple[int, ...]]:
    """Wait until no other process of this machine fetches the data set.

    Yields:
        The descriptor of the lock. The download inherits it, so that the lock lasts as long as it,
        even if this process is killed. None where nothing can be written, and so nothing fetched.

    Raises:
        DataError: on a disk that knows no locks.
    """
    path = Path(kaggle_download.cache_folder(), ".locks", f"{dataset}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:
        descriptor = -1
    if descriptor < 0:
        yield ()
        return
    try:
        _lock(descriptor, path, dataset)
        yield (descriptor,)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path, dataset: str) -> None:
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process, which fetches the Kaggle data set {dataset}")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        raise DataError(
            f"{path} cannot be locked ({error.strerror}): set KAGGLEHUB_CACHE to a folder of"
            " another disk"
        ) from None


def _sentence(
    dataset: str,
    version: int | None,
    files: tuple[str, ...],
    kinds: list[str],
    status: int | None,
    stall_seconds: float,
) -> ConfigError | DataError:
    """Return one sentence for what the client could not do."""
    what = f"the Kaggle data set {dataset}" + (f", version {version}," if version else "")
    where = f"https://www.kaggle.com/datasets/{dataset}"
    if status == 401:
        return ConfigError(f"Kaggle does not know the credentials for {what} (401): {LOGIN}")
    if status == 403:
        return ConfigError(
            f"the account may not read {what} (403): accept its terms at {where}, and {LOGIN}"
        )
    if status == 404:
        names = f" or no file {', '.join(files)} in it" if files else ""
        return DataError(
            f"there is no {what.removeprefix('the ')}{names} (404): check data.source.dataset as"
            f" owner/name, and {where}"
        )
    if status == 429:
        return DataError(f"Kaggle refuses more requests for {what} now (429): wait, and run again")
    if status is not None:
        return DataError(f"Kaggle's server fails for {what} ({status}): run the same command later")
    if "Timeout" in kinds:
        return DataError(
            f"Kaggle has sent nothing of {what} for {stall_seconds:g} seconds: run the same command"
            " again, which continues the download, or raise data.source.stall_seconds"
        )
    if "RequestException" in kinds:
        return DataError(
            f"the download of {what} broke off ({kinds[0]}): check the network, and run the same"
            " command again, which continues it"
        )
    if "DataCorruptionError" in kinds:
        return DataError(f"{what} has arrived damaged: run the same command again")
    if "ValueError" in kinds:
        return ConfigError(
            f"Kaggle's client refuses {what} or the file with the credentials: write"
            f" data.source.dataset as owner/name, and {LOGIN}"
        )
    return DataError(f"{what} cannot be fetched ({kinds[0]}): look at {where}")
