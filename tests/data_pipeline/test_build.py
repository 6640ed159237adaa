"""From source to folder: content, determinism, reuse, and builds that go wrong."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_pipeline import build as module
from data_pipeline.build import build
from data_pipeline.indexed import IndexedReader
from data_pipeline.manifest import verify
from data_pipeline.sources import Document, TextFiles
from data_pipeline.split import SPLITS, plan_split
from data_pipeline.tokenizer import load_tokenizer
from pretrain.config.errors import ConfigError, DataError, StorageError
from pretrain.config.schema import DataConfig

TextConfig = Callable[..., DataConfig]
WriteCorpus = Callable[..., None]
FILES = ["manifest.json", "tokenizer.json", "train.bin", "train.idx", "validation.bin", "validation.idx"]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_corpus: WriteCorpus) -> Path:
    """A working folder with forty documents in raw/."""
    write_corpus(tmp_path / "raw")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_shards_decode_to_the_documents_each_ended_by_its_token(work: Path, text_config: TextConfig) -> None:
    config = text_config("raw/*.txt")
    result = build(config, work / "data")
    tokenizer = load_tokenizer(work / "data" / "tokenizer.json")
    documents = list(TextFiles(["raw/*.txt"]).documents())
    plan = plan_split([document.id for document in documents], config.validation_share)
    for split in SPLITS:
        texts = [part.text for document in documents for chosen, part in plan.assign(document) if chosen == split]
        reader = IndexedReader(work / "data" / split)
        sequences = [reader[index].tolist() for index in range(len(reader))]
        assert all(tokens[-1] == tokenizer.eod_id and tokenizer.eod_id not in tokens[:-1] for tokens in sequences)
        assert [tokenizer.decode(tokens[:-1]) for tokens in sequences] == texts
        assert result.manifest.splits[split].documents == len(texts) > 0
        assert result.manifest.splits[split].utf8_bytes == sum(len(text.encode()) for text in texts)
    verify(work / "data", result.manifest, deep=True)
    assert sorted(contents(work / "data")) == FILES


def test_two_builds_are_equal_byte_for_byte(work: Path, text_config: TextConfig) -> None:
    build(text_config("raw/*.txt"), work / "one")
    build(text_config("raw/*.txt"), work / "two")
    assert contents(work / "one") == contents(work / "two")


def test_one_changed_character_changes_the_fingerprint(work: Path, text_config: TextConfig) -> None:
    before = build(text_config("raw/*.txt"), work / "one").manifest
    path = work / "raw" / "007.txt"
    path.write_text(path.read_text().replace("a", "b", 1))
    assert build(text_config("raw/*.txt"), work / "two").manifest.fingerprint != before.fingerprint


def test_validation_texts_do_not_reach_the_tokenizer(work: Path, text_config: TextConfig) -> None:
    config = text_config("raw/*.txt")
    before = build(config, work / "one").manifest
    documents = [document.id for document in TextFiles(["raw/*.txt"]).documents()]
    plan = plan_split(documents, config.validation_share)
    for document_id in documents:
        [(split, _)] = plan.assign(Document("", "text", document_id))
        if split == "validation":
            Path(document_id).write_text("entirely different " * 30)
    after = build(config, work / "two").manifest
    assert after.source.sha256 != before.source.sha256
    assert after.tokenizer == before.tokenizer
    assert after.splits["train"] == before.splits["train"]
    assert after.splits["validation"] != before.splits["validation"]


def test_batches_do_not_change_the_shards(work: Path, text_config: TextConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    build(text_config("raw/*.txt"), work / "one")
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 100)
    build(text_config("raw/*.txt"), work / "two")
    assert contents(work / "one") == contents(work / "two")


def test_the_same_request_is_reused_untouched(work: Path, text_config: TextConfig) -> None:
    assert not build(text_config("raw/*.txt"), work / "data").reused
    before = {name: os.stat(work / "data" / name).st_mtime_ns for name in FILES}
    again = build(text_config("raw/*"), work / "data")
    assert again.reused
    assert before == {name: os.stat(work / "data" / name).st_mtime_ns for name in FILES}


def test_another_request_is_refused_until_fresh(work: Path, text_config: TextConfig) -> None:
    build(text_config("raw/*.txt"), work / "data")
    before = contents(work / "data")
    for config, reason in (
        (text_config("raw/*.txt", vocab_size=310), "another tokenizer"),
        (text_config("raw/*.txt", validation_share=0.3), "validation share"),
        (text_config("raw/00*.txt"), "another corpus"),
    ):
        with pytest.raises(ConfigError, match=f"{reason}.*--fresh"):
            build(config, work / "data")
        assert contents(work / "data") == before
    result = build(text_config("raw/00*.txt"), work / "data", fresh=True)
    assert not result.reused
    assert contents(work / "data") != before
    verify(work / "data", result.manifest, deep=True)


def test_damaged_shards_are_not_reused(work: Path, text_config: TextConfig) -> None:
    build(text_config("raw/*.txt"), work / "data")
    (work / "data" / "train.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"train\.bin has 0 bytes"):
        build(text_config("raw/*.txt"), work / "data")


def test_a_given_tokenizer_is_copied_and_its_size_checked(work: Path, text_config: TextConfig) -> None:
    first = build(text_config("raw/*.txt"), work / "data").manifest.tokenizer
    given = work / "data" / "tokenizer.json"
    result = build(text_config("raw/00*.txt", tokenizer=given, vocab_size=None), work / "other")
    assert result.manifest.tokenizer == first
    assert (work / "other" / "tokenizer.json").read_bytes() == given.read_bytes()
    assert build(text_config("raw/00*.txt", tokenizer=work / "other" / "tokenizer.json", vocab_size=300), work / "other").reused
    with pytest.raises(ConfigError, match="vocab_size is 301, but the tokenizer has 300"):
        build(text_config("raw/00*.txt", tokenizer=given, vocab_size=301), work / "third")


def test_one_document_gives_both_splits_and_a_small_corpus_a_smaller_vocabulary(
    work: Path, text_config: TextConfig, caplog: pytest.LogCaptureFixture
) -> None:
    result = build(text_config("raw/000.txt", vocab_size=4096), work / "data")
    assert [result.manifest.splits[split].documents for split in SPLITS] == [1, 1]
    assert result.manifest.source.documents == 1
    assert 258 < result.manifest.tokenizer.vocab_size < 4096
    assert "single document" in caplog.text and "not 4096" in caplog.text


class Restless(TextFiles):
    """Its first file grows each time it is read."""

    def documents(self, skipped: object = None) -> Iterator[Document]:
        with Path("raw/000.txt").open("a") as stream:
            stream.write("more\n")
        return super().documents()


def test_a_source_that_changes_under_the_build_leaves_nothing(work: Path, text_config: TextConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "open_source", lambda source: Restless(source.input))
    with pytest.raises(DataError, match="changed while they were read"):
        build(text_config("raw/*.txt"), work / "data")
    assert contents(work / "data") == {}


def test_what_a_killed_build_left_is_replaced(work: Path, text_config: TextConfig, caplog: pytest.LogCaptureFixture) -> None:
    build(text_config("raw/*.txt"), work / "clean")
    (work / "data" / ".building").mkdir(parents=True)
    (work / "data" / ".building" / "train.bin.partial").write_bytes(b"torn")
    (work / "data" / "train.bin").write_bytes(b"torn")
    build(text_config("raw/*.txt"), work / "data")
    assert contents(work / "data") == contents(work / "clean")
    assert "did not finish" in caplog.text


def test_two_builds_in_one_folder_are_refused(work: Path, text_config: TextConfig) -> None:
    (work / "data").mkdir()
    descriptor = os.open(work / "data", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(ConfigError, match="another process is writing"):
        build(text_config("raw/*.txt"), work / "data")
    os.close(descriptor)
    build(text_config("raw/*.txt"), work / "data")


def test_an_output_that_is_a_file_is_refused(work: Path, text_config: TextConfig) -> None:
    with pytest.raises(StorageError, match="cannot create the folder"):
        build(text_config("raw/*.txt"), work / "raw" / "000.txt")
