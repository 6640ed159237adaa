"""A data set in the hub's layout on a disk, and an HTTP server of it that can be made to fail."""

from __future__ import annotations

import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

WIDTH = 15
ROW_GROUP = 8


def document(shard: int, row: int) -> str:
    """A text of as many bytes as all others: with its end a window of 16 tokens of one byte."""
    return f"s{shard:03}r{row:05}".ljust(WIDTH, ".")


def write_hub_folder(
    folder: Path, shards: int, rows: int, kind: str = "jsonl", texts: list[str] | None = None
) -> list[str]:
    """Write shards with a README.md that declares them, and return all texts in order.

    Args:
        kind: jsonl, json.gz or parquet.
        texts: of all rows of all shards; by default :func:`document` makes them.
    """
    (folder / "data").mkdir(parents=True)
    texts = texts or [document(shard, row) for shard in range(shards) for row in range(rows)]
    for shard in range(shards):
        path = folder / "data" / f"train-{shard:05}-of-{shards:05}.{kind}"
        part = texts[shard * rows : (shard + 1) * rows]
        if kind == "parquet":
            pq.write_table(pa.table({"text": part}), path, row_group_size=ROW_GROUP)
        else:
            lines = "".join(json.dumps({"text": text}) + "\n" for text in part).encode()
            path.write_bytes(gzip.compress(lines) if kind == "json.gz" else lines)
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n"
        f"    path: data/train-*.{kind}\n---\n"
    )
    return texts


class HubServer:
    """Serves a folder, by ranges too.

    Attributes:
        faults: what happens to the next requests for bytes, one each: a status such as 503,
            ``drop`` after half of the bytes, or ``stall``.
        always: what happens to every request; None for nothing.
        bytes_sent: of each file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: list[str] = []
        self.always: str | None = None
        self.bytes_sent: dict[str, int] = {}
        self.requests = 0
        self.stopping = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None:
                """Say nothing."""

            def do_HEAD(self) -> None:
                server.reply(self, with_body=False)

            def do_GET(self) -> None:
                server.reply(self, with_body=True)

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)
        self._thread.start()

    def url(self, name: str) -> str:
        """Address of a file."""
        return f"http://127.0.0.1:{self._http.server_port}/{name}"

    def reply(self, handler: BaseHTTPRequestHandler, with_body: bool) -> None:
        """Send a file or a range of it, or fail."""
        self.requests += 1
        fault = self.always or (self.faults.pop(0) if self.faults and with_body else None)
        if fault is not None and fault.isdigit():
            handler.send_response(int(fault))
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        if fault == "stall":
            self.stopping.wait(60)
            handler.close_connection = True
            return
        path = self.folder / handler.path.lstrip("/")
        if not path.is_file():
            handler.send_response(404)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        content = path.read_bytes()
        first, last = 0, len(content) - 1
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", handler.headers.get("Range", ""))
        if asked:
            first = int(asked[1])
            last = min(int(asked[2] or last), last)
        part = content[first : last + 1]
        handler.send_response(206 if asked else 200)
        handler.send_header("Accept-Ranges", "bytes")
        handler.send_header("Content-Length", str(len(part)))
        if asked:
            handler.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        handler.end_headers()
        if not with_body:
            return
        if fault == "drop":
            part = part[: len(part) // 2]
            handler.close_connection = True
        try:
            handler.wfile.write(part)
        except ConnectionError:  # the client has read enough
            handler.close_connection = True
            return
        self.bytes_sent[path.name] = self.bytes_sent.get(path.name, 0) + len(part)
        if fault == "drop":
            handler.wfile.flush()
            handler.connection.close()

    def close(self) -> None:
        """End all requests."""
        self.stopping.set()
        self._http.shutdown()
        self._http.server_close()


@contextmanager
def hub_server(folder: Path) -> Iterator[HubServer]:
    """A server of a folder until the block ends."""
    server = HubServer(folder)
    try:
        yield server
    finally:
        server.close()
