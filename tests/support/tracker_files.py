"""What trackers keep on disk when they have no network, read back in their own formats."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, HEADER, LAST_OF_ITS_RECORD = 32_768, 7, (1, 4)


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a ``.wandb`` file: LevelDB's log format behind seven bytes of W&B's own."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, parts = path.read_bytes(), HEADER, b""
    assert content.startswith(b":W&B")
    while place + HEADER <= len(content):
        if BLOCK - place % BLOCK < HEADER:
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        parts += content[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in LAST_OF_ITS_RECORD:
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def wandb_history(records: list[Any]) -> list[dict[str, Any]]:
    """What was logged, one mapping a call."""
    rows = [record.history for record in records if record.WhichOneof("record_type") == "history"]
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row.item}
        for row in rows
    ]


def comet_messages(archive: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """An offline experiment: its description and its messages."""
    with zipfile.ZipFile(archive) as content:
        messages = [
            json.loads(line) for line in content.read("messages.json").decode().splitlines()
        ]
        return json.loads(content.read("experiment.json")), messages


def comet_metrics(messages: list[dict[str, Any]]) -> dict[tuple[str, int], float]:
    """Values by name and step."""
    metrics = [
        message["payload"]["metric"] for message in messages if message["type"] == "metric_msg"
    ]
    return {
        (metric["metricName"], metric["step"]): float(metric["metricValue"])
        for metric in metrics
        if metric["step"] is not None
    }


def contents(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Every file below a folder, and every file inside of archives."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            yield str(path), path.read_bytes()
            if path.suffix == ".zip":
                with zipfile.ZipFile(path) as archive:
                    yield from (
                        (f"{path}:{name}", archive.read(name)) for name in archive.namelist()
                    )


def holding(folder: Path, text: str) -> list[str]:
    """The files that hold a text."""
    return [name for name, content in contents(folder) if text.encode() in content]
