"""Reads a data set of the package ``datasets`` shard by shard, from any row of a shard on.

A shard is one file of the data set. The package opens a file where it is, on a disk or behind a
URL, and keeps nothing. To begin at a row, row groups of Parquet before it are not read; of a JSON
or text file the bytes before it are read and passed over.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING, TypeVar
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from data_pipeline.sources.files import one_line
from data_pipeline.sources.interface import Patience
from pretrain.core.errors import StorageError

if TYPE_CHECKING:
    import pyarrow
    from datasets import DatasetBuilder, IterableDataset

logger = logging.getLogger(__name__)

Value = TypeVar("Value")

# A request for one range of a file is repeated so often at once, before the file is opened again.
QUICK_ATTEMPTS = 2
QUICK_WAIT_SECONDS = 0.5
# By name: neither of the packages that raise them is imported for it.
NETWORK_ERRORS = {
    "ClientError",
    "HTTPError",
    "RequestError",
    "RequestException",
    "IncompleteRead",
}
PARQUET = ".parquet"
OFFLINE = "OfflineModeIsEnabled"
# The package raises it for a file that it could not look at, by an address without its scheme.
MANGLED_ADDRESS = "NonHttpUrlClientError"
# A server that has too much to do, or is being restarted; others mean that asking again is no use.
PASSING_STATUS = {408, 425, 429, 500, 502, 503, 504}


@dataclass
class HubStream:
    """The shards of one split.

    Several threads may read shards at the same time.

    Args:
        name: of the data set, for sentences.
        open_builder: opens it; it may fail while the hub is away.
        split: of the data set.

    Raises:
        StorageError: if the hub fails for longer than ``patience`` allows.
    """

    name: str
    open_builder: Callable[[], DatasetBuilder]
    split: str
    patience: Patience
    _lock: Lock = field(default_factory=Lock)

    @cached_property
    def builder(self) -> DatasetBuilder:
        """The package's description of the data set, which lists its files."""
        quick_retries()
        return self._persist(self.open_builder)

    @cached_property
    def whole(self) -> IterableDataset:
        """All shards, one after the other. The first bytes are read, which say what columns are."""
        stream: IterableDataset = self._persist(
            lambda: self.builder.as_streaming_dataset(split=self.split)
        )
        return stream.with_format("arrow")

    @property
    def shards(self) -> list[str]:
        """The shards' names, which are those of their files where the package gives them."""
        with self._lock:
            count = self.whole.num_shards
        files = (self.builder.config.data_files or {}).get(self.split, [])
        if len(files) == count:
            return [str(file) for file in files]
        return [f"{self.name} shard {number}" for number in range(count)]

    def tables(
        self, shard: int | None, first_row: int, rows: int
    ) -> Iterator[tuple[int, pyarrow.Table]]:
        """Tables of up to ``rows`` rows from a row on, each with the number of its first row.

        A connection that is lost is opened again at the next row.

        Args:
            shard: its number; None for all, one after the other.
        """
        row = first_row
        waits = self.patience.waits()
        while True:
            try:
                for table in self._tables(shard, row, rows):
                    yield row, table
                    row += len(table)
                    waits = self.patience.waits()
                return
            except Exception as error:
                self._wait_after(error, waits)

    def _tables(self, shard: int | None, first_row: int, rows: int) -> Iterator[pyarrow.Table]:
        with self._lock:
            stream = self.whole
        if shard is None:
            yield from (stream.skip(first_row) if first_row else stream).iter(rows)
            return
        stream = stream.shard(stream.num_shards, shard)
        if not first_row:
            yield from stream.iter(rows)
            return
        file = self.shards[shard]
        # Only a Parquet file says where its rows are.
        if file.endswith(PARQUET):
            yield from self._row_groups(file, first_row, rows)
        else:
            yield from stream.skip(first_row).iter(rows)

    def _row_groups(self, file: str, first_row: int, rows: int) -> Iterator[pyarrow.Table]:
        """Tables of a Parquet file from a row on; row groups before it are not read."""
        import pyarrow
        from datasets import DownloadConfig
        from datasets.utils.file_utils import xopen
        from pyarrow.parquet import ParquetFile

        builder = self.builder
        config = DownloadConfig(token=builder.token, storage_options=builder.storage_options)
        with xopen(file, "rb", download_config=config) as opened:
            parquet = ParquetFile(opened)
            footer = parquet.metadata
            sizes = [footer.row_group(number).num_rows for number in range(footer.num_row_groups)]
            group = skipped = 0
            while group < len(sizes) and skipped + sizes[group] <= first_row:
                skipped += sizes[group]
                group += 1
            rest = first_row - skipped
            for batch in parquet.iter_batches(rows, row_groups=[*range(group, len(sizes))]):
                if batch.num_rows > rest:
                    yield pyarrow.Table.from_batches([batch.slice(rest)])
                rest = max(rest - batch.num_rows, 0)

    def _persist(self, action: Callable[[], Value]) -> Value:
        waits = self.patience.waits()
        while True:
            try:
                return action()
            except Exception as error:
                self._wait_after(error, waits)

    def _wait_after(self, error: Exception, waits: Iterator[float]) -> None:
        """Wait before the next attempt; raise ``error`` if it is none of the network."""
        reason = network_failure(error, self.patience.timeout_seconds)
        if reason is None:
            raise error
        wait = next(waits, None)
        if wait is None:
            raise StorageError(
                f"the data set '{self.name}' is not delivered ({reason}), after"
                f" {self.patience.retries} retries with growing waits: check the network and the"
                " hub's status and run the same command again, or raise data.streaming_retries"
            ) from None
        logger.warning(
            "the data set '%s' is not delivered (%s); the next attempt is in %g s",
            self.name,
            reason,
            wait,
        )
        time.sleep(wait)


def quick_retries() -> None:
    """Make the package leave waiting to :class:`Patience`: by itself it retries for minutes."""
    import datasets

    datasets.config.STREAMING_READ_MAX_RETRIES = QUICK_ATTEMPTS
    datasets.config.STREAMING_READ_RETRY_INTERVAL = QUICK_WAIT_SECONDS
    datasets.config.STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL = QUICK_WAIT_SECONDS
    datasets.config.STREAMING_READ_RATE_LIMIT_RETRY_INTERVAL = QUICK_WAIT_SECONDS
    datasets.config.STREAMING_OPEN_MAX_RETRIES = 1
    datasets.config.STREAMING_OPEN_RETRY_INTERVAL = 0


def network_failure(error: BaseException, timeout_seconds: float) -> str | None:
    """What went wrong if asking again may help: a timeout, a lost connection, a busy server.

    None for any other error.
    """
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    names = [{kind.__name__ for kind in type(link).__mro__} for link in chain]
    # What HF_HUB_OFFLINE forbids stays forbidden, and the package calls it a ConnectionError.
    if any(
        OFFLINE in kinds or OFFLINE in str(link) for kinds, link in zip(names, chain, strict=True)
    ):
        return None
    for link in chain:
        status = _status(link)
        if status is not None:
            return f"status {status}" if status in PASSING_STATUS else None
    if any(MANGLED_ADDRESS in kinds for kinds in names):
        return "a file cannot be opened"
    for link, kinds in zip(reversed(chain), reversed(names), strict=True):
        is_network = isinstance(link, (TimeoutError, ConnectionError)) or NETWORK_ERRORS & kinds
        if is_network:
            # What follows a question mark may be a signature that lets anybody read.
            text = re.sub(r"\?[^\s'\"]+", "?...", one_line(str(link)))
            return f"{type(link).__name__} {text}".rstrip()
    address = re.search(r"https?://[^\s'\"]+", str(error))
    if isinstance(error, FileNotFoundError) and address:
        return _failure_at(address[0], timeout_seconds)
    return None


def _status(error: BaseException) -> int | None:
    """The status of an HTTP response that an error is about."""
    response = getattr(error, "response", None)
    status = getattr(error, "status", None) or getattr(response, "status_code", None)
    return status if isinstance(status, int) else None


def _failure_at(address: str, timeout_seconds: float) -> str | None:
    """Why a file cannot be read now; None if it is not there.

    The package says of a server that is away that the file does not exist.
    """
    try:
        with urlopen(Request(address, method="HEAD"), timeout=timeout_seconds):
            return "a file could not be opened"
    except HTTPError as error:
        return f"status {error.code}" if error.code in PASSING_STATUS else None
    except OSError as error:
        return f"{type(error).__name__} {one_line(str(error))}".rstrip()


def timeouts(patience: Patience) -> dict[str, dict[str, object]]:
    """Options for the package's file systems, so that a stalled connection is a failed one."""
    import aiohttp

    timeout = aiohttp.ClientTimeout(
        total=None, sock_connect=patience.timeout_seconds, sock_read=patience.timeout_seconds
    )
    options: dict[str, object] = {"client_kwargs": {"timeout": timeout, "trust_env": True}}
    return {"http": options, "https": options}
