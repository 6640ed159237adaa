"""A Kaggle data set, from a local server that speaks to Kaggle's own client."""

from __future__ import annotations

import base64
import io
import json
import logging
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from pydantic import ValidationError

from data_pipeline.config import DataConfig
from data_pipeline.loading.document_groups import StreamedSource
from data_pipeline.preprocess.coordinator import build
from data_pipeline.preprocess.plan import request_sha256
from data_pipeline.preprocess.workspace import Output
from data_pipeline.shards.datasets import Datasets
from data_pipeline.sources.folder_walk import say
from data_pipeline.sources.interface import Document, ReadContext, Source, open_source
from data_pipeline.sources.kaggle import _downloaded
from pretrain.core.errors import ConfigError, DataError, PipelineError

pytest.importorskip("kagglehub")
KEY = "0123456789abcdef0123456789abcdef"
FILES = {
    "reviews.csv": "review,stars\n" + "".join(f'"a review, number {n}",{n}\n' for n in range(40)),
    "more/rows.jsonl": "".join(json.dumps({"review": f"row {n} of more"}) + "\n" for n in range(9)),
    "LICENSE": "CC0",
}


class Server(ThreadingHTTPServer):
    """A data set of two versions; ``trouble`` makes responses go wrong."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.newest = 2
        self.trouble: list[str] = []
        self.seen: list[tuple[str, dict[str, Any], str]] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = self.path.rpartition("/")[2]
        self.server.seen.append((name, body, self.headers.get("Authorization", "")))
        trouble = self.server.trouble.pop(0) if self.server.trouble else ""
        if trouble.isdigit():
            return self._answer(int(trouble), b'{"message": "no"}', "application/json")
        if trouble == "stall":
            time.sleep(4.0)
            return None
        if trouble == "slow":
            time.sleep(0.8)
        if name == "GetDataset":
            answer = json.dumps({"currentVersionNumber": self.server.newest}).encode()
            return self._answer(200, answer, "application/json")
        if name == "ListTreeDatasetFiles":
            inside = [{"relativeUrl": file} for file in FILES if file.startswith(body["path"])]
            return self._answer(200, json.dumps({"files": inside}).encode(), "application/json")
        content, kind = self._content(body)
        if content is None:
            return self._answer(404, b'{"message": "no such file"}', "application/json")
        if trouble == "break":
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return None
        return self._answer(200, content, kind)

    def _content(self, body: dict[str, Any]) -> tuple[bytes | None, str]:
        name = body.get("fileName")
        if name:
            found = FILES.get(name)
            return (None if found is None else found.encode()), "application/octet-stream"
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as output:
            for path, text in FILES.items():
                is_new = body["datasetVersionNumber"] > 2 and path == "reviews.csv"
                output.writestr(path, text + '"one more",5\n' * is_new)
        return archive.getvalue(), "application/zip"

    def _answer(self, status: int, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    running = Server()
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    for name in ("KAGGLE_API_TOKEN", "KAGGLE_CONFIG_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("KAGGLE_API_ENDPOINT", running.address)
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("KAGGLE_USERNAME", "somebody")
    monkeypatch.setenv("KAGGLE_KEY", KEY)
    _downloaded.cache_clear()
    say.cache_clear()
    yield running
    running.shutdown()
    running.server_close()


def config(**source: Any) -> DataConfig:
    section = {"kind": "kaggle", "dataset": "some-body/re-views", "text_field": "review"} | source
    section = {"stall_seconds": 1.5, "attempts": 2} | section
    tokenizer = {"kind": "train_bpe", "vocab_size": 300}
    return DataConfig.model_validate({"source": section, "tokenizer": tokenizer})


def source_of(data: DataConfig) -> Source[Any]:
    return open_source(data.named_sources["all"], ReadContext.of(data, "all"))


def test_a_data_set_is_fetched_once_read_and_named_with_its_version(
    server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    manifest = build(config(), Output(tmp_path / "data"), workers=1).manifest
    source = manifest.sources["all"]
    assert (source.documents, source.revision, source.kind) == (49, "2", "kaggle")
    assert [name for name, _, _ in server.seen] == ["GetDataset", "DownloadDataset"]
    _, asked, login = server.seen[1]
    assert (asked["ownerSlug"], asked["datasetSlug"]) == ("some-body", "re-views")
    assert asked["datasetVersionNumber"] == 2
    assert base64.b64decode(login.removeprefix("Basic ")).decode() == f"somebody:{KEY}"
    printed = capfd.readouterr()
    assert KEY not in printed.out + printed.err and printed.out == ""
    for path in (tmp_path / "data").rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes()
    # Another process asks for the newest version, and finds its files in the cache.
    _downloaded.cache_clear()
    assert build(config(), Output(tmp_path / "data"), workers=1).reused
    assert [name for name, _, _ in server.seen[2:]] == ["GetDataset"]
    # A newer version is other data; the pinned one needs no server.
    _downloaded.cache_clear()
    server.newest = 3
    with pytest.raises(ConfigError, match="holds data of another corpus"):
        build(config(), Output(tmp_path / "data"), workers=1)
    _downloaded.cache_clear()
    before = len(server.seen)
    pinned = build(config(version=2), Output(tmp_path / "pinned"), workers=1).manifest
    assert pinned.sources["all"].revision == "2" and len(server.seen) == before


def test_named_files_and_patterns_choose(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KAGGLE_API_TOKEN", f"KGAT_{KEY}")
    one = build(config(files=["reviews.csv"]), Output(tmp_path / "one"), workers=1).manifest
    assert one.sources["all"].documents == 40
    assert server.seen[-1][1]["fileName"] == "reviews.csv"
    assert server.seen[-1][2] == f"Bearer KGAT_{KEY}"
    some = build(config(files=["more/*"]), Output(tmp_path / "some"), workers=1).manifest
    assert some.sources["all"].documents == 9
    with pytest.raises(DataError, match=r"no file of the Kaggle data set .* fits \*.parquet"):
        source_of(config(files=["*.parquet"])).units(1 << 20)


TROUBLES = [
    (["401"], [], "does not know the credentials .*KAGGLE_USERNAME and KAGGLE_KEY"),
    (["403"], [], "the account may not read .*accept its terms at https://www.kaggle.com/"),
    (["404"], [], "there is no Kaggle data set some-body/re-views .404.: check"),
    (["", "404", "404"], ["gone.csv"], "or no file gone.csv in it .404."),
    (["429"], [], "refuses more requests .* now .429.: wait"),
    (["500", "503"], [], "Kaggle's server fails for .* .503.: run the same command later"),
    (["stall"] * 2, [], "has sent nothing of .* for 1.5 seconds: run the same command again"),
    (["", "break", "", "break"], [], "broke off|arrived damaged"),
]


def test_each_trouble_is_one_sentence_and_what_passes_is_tried_again(
    server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for trouble, files, sentence in TROUBLES:
        server.trouble = list(trouble)
        with pytest.raises(PipelineError, match=sentence) as caught:
            source_of(config(files=files)).units(1 << 20)
        assert KEY not in str(caught.value) and "\n" not in str(caught.value)
    assert "Traceback" not in capfd.readouterr().err
    # Nothing of the trouble stays.
    server.trouble = ["503"]
    manifest = build(config(), Output(tmp_path / "data"), workers=1).manifest
    assert manifest.sources["all"].documents == 49


def test_names_that_are_none_and_a_missing_client_are_refused(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("no-slash", "../x", "a/b/c", ""):
        with pytest.raises(ValidationError):
            config(dataset=name)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="install it with pip install kagglehub"):
        source_of(config()).units(1 << 20)
    assert server.seen == []


def test_a_file_has_one_path_to_split_by_on_every_machine_and_of_every_version(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[set[str | None]] = []
    for cache, version in (("cache", 2), ("other/kagglehub", 3)):
        monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / cache))
        data = config(version=version).model_copy(update={"split_by": "path"})
        units = source_of(data).units(1 << 20)
        # Another process, such as a worker, has listed nothing.
        worker = source_of(data)
        names.append(
            {
                worker.split_name(document, unit)
                for unit in units
                for document in worker.read(unit)
                if isinstance(document, Document)
            }
        )
        assert all(f"/{cache}/datasets/" in file for unit in units for file in unit.files)
    assert names == [{"some-body/re-views/reviews.csv", "some-body/re-views/more/rows.jsonl"}] * 2
    monkeypatch.setenv("KAGGLE_CACHE_MOUNT_FOLDER", "/mounted")
    assert worker.path_of("/mounted/re-views/a/b.csv") == "some-body/re-views/a/b.csv"
    with pytest.raises(DataError, match="is not in the cache of Kaggle's client"):
        worker.path_of("/elsewhere/b.csv")


def test_how_a_version_is_fetched_makes_no_other_data(server: Server, tmp_path: Path) -> None:
    def fingerprint(data: DataConfig) -> str:
        folder = cast(Datasets, SimpleNamespace(first=SimpleNamespace(folder=tmp_path)))
        return StreamedSource(data, "all", folder, 1).fingerprint

    patient = {"stall_seconds": 9.0, "attempts": 3}
    plain, pinned, other = config(), config(version=2, **patient), config(encoding="latin-1")
    assert request_sha256(plain, None) == request_sha256(pinned, None)
    assert request_sha256(plain, None) != request_sha256(other, None)
    several = [
        data.model_copy(update={"source": None, "sources": data.named_sources})
        for data in (plain, pinned, other)
    ]
    sums = [request_sha256(data, None) for data in several]
    assert sums[0] == sums[1] != sums[2]
    before = fingerprint(plain)
    assert before == fingerprint(pinned) != fingerprint(other)
    units = source_of(plain).units(1 << 20)
    # The stamp is of the version, not of when it was fetched.
    sizes = {Path(unit.files[0]).name: unit.stamp for unit in units}
    assert sizes == {
        name.rpartition("/")[2]: f"version 2:{len(FILES[name])}"
        for name in ("reviews.csv", "more/rows.jsonl")
    }
    build(plain, Output(tmp_path / "data"), workers=1)
    assert build(pinned, Output(tmp_path / "data"), workers=1).reused
    assert fingerprint(config(version=3)) != before


def test_one_process_of_a_machine_fetches_a_data_set_and_the_others_wait(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    # Locks of the kernel are those of an open file: threads stand for processes.
    server.trouble = ["slow", "slow"]
    with ThreadPoolExecutor(3) as pool:
        fetch = _downloaded.__wrapped__
        runs = [pool.submit(fetch, "some-body/re-views", 2, (), 20.0, 1) for _ in range(3)]
        results = [run.result() for run in runs]
    assert results[0] == results[1] == results[2] and len(results[0][0]) == len(FILES)
    assert [name for name, _, _ in server.seen] == ["DownloadDataset"]
    assert "waiting for another process, which fetches the Kaggle data set" in caplog.text


def test_a_cache_that_nothing_can_be_written_to_is_read_without_a_lock(
    server: Server, tmp_path: Path
) -> None:
    first = _downloaded.__wrapped__("some-body/re-views", 2, (), 20.0, 1)
    locks = tmp_path / "cache" / ".locks"
    next(locks.rglob("*.lock")).unlink()
    (locks / "some-body").rmdir()
    locks.rmdir()
    locks.write_text("no folder can be here")
    assert _downloaded.__wrapped__("some-body/re-views", 2, (), 20.0, 1) == first


def test_files_named_twice_are_read_once_and_those_left_out_are_said(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    names = ["more/rows.jsonl", "more", "./more/rows.jsonl", "more/rows.jsonl"]
    source = source_of(config(files=names))
    units = source.units(1 << 20)
    assert len(units) == 1 and len(list(source.read(units[0]))) == 9
    assert "more names" not in caplog.text and "named twice" not in caplog.text
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            source_of(config()).units(1 << 20)
    sentence = (
        "the Kaggle data set some-body/re-views: 2 of 3 files are read; not read: 1 of side files,"
        " such as LICENSE"
    )
    assert caplog.text.count(sentence) == 1
