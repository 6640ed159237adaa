"""From source to folder: content, determinism, reuse, and builds that go wrong."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.config import DataConfig
from data_pipeline.preprocess import coordinator, units, worker
from data_pipeline.preprocess.coordinator import BuildResult, build
from data_pipeline.preprocess.workspace import Output
from data_pipeline.shards.indexed import IndexedReader
from data_pipeline.shards.manifest import load_manifest, verify
from data_pipeline.shards.split import SPLITS, position, text_digest
from data_pipeline.sources.interface import Unit
from data_pipeline.sources.jsonl import Jsonl
from data_pipeline.tokenizer.tokenizer import load_tokenizer
from pretrain.core.errors import ConfigError, DataError, StorageError

TextConfig = Callable[..., DataConfig]
WriteCorpus = Callable[..., None]
FILES = [
    "manifest.json",
    "tokenizer.json",
    "train.bin",
    "train.idx",
    "validation.bin",
    "validation.idx",
]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_corpus: WriteCorpus) -> Path:
    """A working folder with forty documents in raw/."""
    write_corpus(tmp_path / "raw")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def texts(manifest: Any, split: str) -> list[str]:
    """The documents of a split, decoded; each must end with its end-of-document token."""
    tokenizer = load_tokenizer(manifest.tokenizer_path)
    result = []
    for shard in manifest.splits[split].shards:
        reader = IndexedReader(manifest.folder / shard.prefix)
        for index in range(len(reader)):
            tokens = reader[index].tolist()
            assert tokens[-1] == tokenizer.eod_id and tokenizer.eod_id not in tokens[:-1]
            result.append(tokenizer.decode(tokens[:-1]))
    return result


def jsonl(path: Path, documents: list[Any], **fields: Any) -> Path:
    path.write_text(
        "".join(
            json.dumps(document if isinstance(document, dict) else {"text": document}) + "\n"
            for document in documents
        )
    )
    return path


def section(path: Path, **settings: Any) -> DataConfig:
    """The data section of a JSONL file."""
    base = {
        "source": {"kind": "jsonl", "input": [str(path)]},
        "tokenizer": {"kind": "train_bpe", "vocab_size": 300},
        "validation_share": 0.2,
    }
    return DataConfig.model_validate(base | settings)


DOCUMENTS = [
    f"document {number} " + " ".join(str(number * step % 97) for step in range(30))
    for number in range(200)
]


def test_shards_decode_to_the_documents_each_ended_by_its_token(
    work: Path, text_config: TextConfig
) -> None:
    manifest = build(text_config("raw/*.txt"), Output(work / "data")).manifest
    originals = {path.read_text(encoding="utf-8") for path in (work / "raw").iterdir()}
    found = {split: texts(manifest, split) for split in SPLITS}
    assert {text for split in SPLITS for text in found[split]} == originals
    for split in SPLITS:
        assert manifest.splits[split].documents == len(found[split]) > 0
        assert manifest.splits[split].utf8_bytes == sum(len(text.encode()) for text in found[split])
    assert manifest.sources["all"].records == manifest.sources["all"].documents == 40
    verify(manifest, deep=True)
    assert sorted(contents(work / "data")) == FILES


def test_two_builds_are_equal_byte_for_byte(work: Path, text_config: TextConfig) -> None:
    build(text_config("raw/*.txt"), Output(work / "one"))
    build(text_config("raw/*.txt"), Output(work / "two"))
    assert contents(work / "one") == contents(work / "two")


def test_one_changed_character_changes_the_fingerprint(work: Path, text_config: TextConfig) -> None:
    before = build(text_config("raw/*.txt"), Output(work / "one")).manifest
    path = work / "raw" / "007.txt"
    path.write_text(path.read_text().replace("a", "b", 1))
    assert (
        build(text_config("raw/*.txt"), Output(work / "two")).manifest.fingerprint
        != before.fingerprint
    )


def test_validation_texts_do_not_reach_the_tokenizer(work: Path, text_config: TextConfig) -> None:
    before = build(text_config("raw/*.txt"), Output(work / "one")).manifest
    held_out = set(texts(before, "validation"))
    others = (
        text
        for text in (f"entirely different {number} " * 30 for number in range(1000))
        if position(text_digest(text)) < 0.2
    )
    for path in (work / "raw").iterdir():
        if path.read_text(encoding="utf-8") in held_out:
            path.write_text(next(others))
    after = build(text_config("raw/*.txt"), Output(work / "two")).manifest
    assert after.sources["all"].sha256 != before.sources["all"].sha256
    assert after.tokenizer == before.tokenizer
    assert after.splits["train"] == before.splits["train"]
    assert after.splits["validation"] != before.splits["validation"]


@pytest.mark.parametrize(("name", "value"), [("BATCH_BYTES", 100), ("BATCH_DOCUMENTS", 1)])
def test_batches_do_not_change_the_shards(
    work: Path, text_config: TextConfig, monkeypatch: pytest.MonkeyPatch, name: str, value: int
) -> None:
    build(text_config("raw/*.txt"), Output(work / "one"))
    monkeypatch.setattr(worker, name, value)
    build(text_config("raw/*.txt"), Output(work / "two"))
    assert contents(work / "one") == contents(work / "two")


def test_any_number_of_workers_writes_the_same_bytes(work: Path) -> None:
    config = section(jsonl(work / "many.jsonl", DOCUMENTS), unit_bytes=1000, max_shard_bytes=65536)
    for workers in (1, 2, 7):
        build(config, Output(work / str(workers)), workers=workers)
    assert contents(work / "1") == contents(work / "2") == contents(work / "7")
    other = section(work / "many.jsonl", unit_bytes=1000, validation_share=0.3)
    assert contents(work / "1") != contents(build(other, Output(work / "other")).folder)


def test_documents_of_a_file_come_in_its_order_whatever_the_units(work: Path) -> None:
    path = jsonl(work / "many.jsonl", DOCUMENTS)
    for unit_bytes in (97, 777, 10_000_000):
        config = section(path, unit_bytes=unit_bytes, validation_share=0.0)
        assert texts(build(config, Output(work / str(unit_bytes))).manifest, "train") == DOCUMENTS


def test_shards_stay_under_their_limit_and_together_are_the_corpus(work: Path) -> None:
    documents = [f"{number} " * 4000 for number in range(30)]
    whole = build(
        section(jsonl(work / "big.jsonl", documents), unit_bytes=100_000, max_shard_bytes=None),
        Output(work / "whole"),
    )
    cut = build(
        section(work / "big.jsonl", unit_bytes=100_000, max_shard_bytes=65536), Output(work / "cut")
    )
    shards = cut.manifest.splits["train"].shards
    assert len(shards) > 3 and [shard.prefix for shard in shards][:2] == [
        "train_00000",
        "train_00001",
    ]
    assert all(shard.bin_bytes <= 65536 or shard.documents == 1 for shard in shards)
    assert texts(cut.manifest, "train") == texts(whole.manifest, "train")
    assert (
        cut.manifest.splits["train"].tokens
        == whole.manifest.splits["train"].tokens
        == sum(shard.tokens for shard in shards)
    )


def test_the_same_request_is_reused_untouched_and_touched_files_are_read_again(
    work: Path, text_config: TextConfig
) -> None:
    assert not build(text_config("raw/*.txt"), Output(work / "data")).reused
    before = {name: os.stat(work / "data" / name).st_mtime_ns for name in FILES}
    assert build(text_config("raw/*.txt"), Output(work / "data")).reused
    os.utime(work / "raw" / "000.txt")
    assert build(text_config("raw/*.txt"), Output(work / "data")).reused
    assert before == {name: os.stat(work / "data" / name).st_mtime_ns for name in FILES}
    (work / "raw" / "000.txt").write_text("another text")
    with pytest.raises(ConfigError, match="another corpus.*--fresh"):
        build(text_config("raw/*.txt"), Output(work / "data"))


def test_another_request_is_refused_until_fresh(work: Path, text_config: TextConfig) -> None:
    build(text_config("raw/*.txt"), Output(work / "data"))
    before = contents(work / "data")
    for config in (
        text_config("raw/*.txt", vocab_size=310),
        text_config("raw/*.txt", validation_share=0.3),
        text_config("raw/00*.txt"),
    ):
        with pytest.raises(ConfigError, match=r"holds data of another corpus.*--fresh"):
            build(config, Output(work / "data"))
        assert contents(work / "data") == before
    result = build(text_config("raw/00*.txt"), Output(work / "data"), fresh=True)
    assert not result.reused
    assert contents(work / "data") != before
    verify(result.manifest, deep=True)


def test_a_smaller_fresh_build_leaves_no_shard_of_the_larger_one(work: Path) -> None:
    path = jsonl(work / "big.jsonl", [f"{number} " * 4000 for number in range(30)])
    build(section(path, max_shard_bytes=65536), Output(work / "data"))
    assert "train_00003.bin" in contents(work / "data")
    build(section(path), Output(work / "data"), fresh=True)
    assert sorted(contents(work / "data")) == FILES


def test_damaged_shards_are_not_reused(work: Path, text_config: TextConfig) -> None:
    build(text_config("raw/*.txt"), Output(work / "data"))
    (work / "data" / "train.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"train\.bin has 0 bytes"):
        build(text_config("raw/*.txt"), Output(work / "data"))


def test_a_given_tokenizer_is_copied_and_its_size_checked(
    work: Path, text_config: TextConfig
) -> None:
    first = build(text_config("raw/*.txt"), Output(work / "data")).manifest.tokenizer
    given = work / "data" / "tokenizer.json"
    result = build(
        text_config("raw/00*.txt", tokenizer=given, vocab_size=None), Output(work / "other")
    )
    assert result.manifest.tokenizer == first
    assert (work / "other" / "tokenizer.json").read_bytes() == given.read_bytes()
    assert build(
        text_config("raw/00*.txt", tokenizer=work / "other" / "tokenizer.json", vocab_size=300),
        Output(work / "other"),
    ).reused
    with pytest.raises(
        ConfigError, match=r"vocab_size is 301, but .*tokenizer\.json has 300 entries"
    ):
        build(text_config("raw/00*.txt", tokenizer=given, vocab_size=301), Output(work / "third"))


def test_one_document_gives_both_splits_and_a_small_corpus_a_smaller_vocabulary(
    work: Path, text_config: TextConfig, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = build(text_config("raw/000.txt", vocab_size=4096), Output(work / "data")).manifest
    assert [manifest.splits[split].documents for split in SPLITS] == [1, 1]
    assert manifest.sources["all"].records == 1
    assert texts(manifest, "train")[0] + texts(manifest, "validation")[0] == (
        work / "raw" / "000.txt"
    ).read_text(encoding="utf-8")
    assert 258 < manifest.tokenizer.vocab_size < 4096
    assert caplog.text.count("single text") == 1 and "not 4096" in caplog.text


def test_neither_split_is_empty_with_a_given_tokenizer(work: Path, text_config: TextConfig) -> None:
    build(text_config("raw/*.txt"), Output(work / "data"))
    given = work / "data" / "tokenizer.json"
    for share in (1e-6, 1 - 1e-6):
        config = text_config("raw/*.txt", tokenizer=given, vocab_size=None, validation_share=share)
        manifest = build(config, Output(work / str(share))).manifest
        assert sorted(manifest.splits[split].documents for split in SPLITS) == [1, 39]


def test_sources_have_shards_and_accounts_of_their_own(work: Path) -> None:
    jsonl(work / "a.jsonl", DOCUMENTS[:50])
    jsonl(work / "b.jsonl", [*DOCUMENTS[50:90], 7])
    sources = {
        "first": {"kind": "jsonl", "input": [str(work / "a.jsonl")]},
        "second": {"kind": "jsonl", "input": [str(work / "b.jsonl")], "split": "train"},
        "held": {"kind": "text", "input": [str(work / "raw/*.txt")], "split": "validation"},
    }
    manifest = build(
        section(work / "a.jsonl", source=None, sources=sources), Output(work / "data")
    ).manifest
    train = {
        shard.prefix: (shard.source, shard.documents) for shard in manifest.splits["train"].shards
    }
    assert train["train_second"] == ("second", 40)
    assert {shard.source for shard in manifest.splits["validation"].shards} == {"first", "held"}
    assert (
        manifest.sources["second"].bad == {"not_a_string": 1}
        and manifest.sources["second"].records == 41
    )
    assert manifest.sources["held"].share == 0.0
    assert manifest.sources["first"].share + manifest.sources["second"].share == pytest.approx(
        1.0, abs=1e-5
    )


def test_megatrons_form_is_one_shard_with_nothing_held_out(work: Path) -> None:
    output = Output(work / "data", "corpus")
    config = section(jsonl(work / "a.jsonl", DOCUMENTS), validation_share=0.0, max_shard_bytes=None)
    manifest = build(config, output).manifest
    assert sorted(contents(work / "data")) == [
        "corpus.bin",
        "corpus.idx",
        "corpus.manifest.json",
        "corpus.tokenizer.json",
    ]
    assert texts(manifest, "train") == DOCUMENTS and list(manifest.splits) == ["train"]
    assert load_manifest(work / "data" / "corpus") == manifest
    build(
        section(jsonl(work / "b.jsonl", DOCUMENTS[:9]), validation_share=0.0),
        Output(work / "data", "other"),
    )
    assert build(config, output).reused


def test_bad_records_are_skipped_counted_and_listed_with_their_place(work: Path) -> None:
    path = work / "mixed.jsonl"
    lines = [json.dumps({"text": text}).encode() for text in DOCUMENTS[:50]]
    bad = {
        3: b"{",
        17: b'{"text": 5}',
        30: b'\xff\xfe{"text": "a"}',
        44: b'{"other": "a"}',
        49: b'{"text": " "}',
    }
    path.write_bytes(b"\n".join(bad.get(number, line) for number, line in enumerate(lines)))
    for unit_bytes in (100, 1 << 20):
        result = build(
            section(path, unit_bytes=unit_bytes, max_bad_share=0.1), Output(work / str(unit_bytes))
        )
        source = result.manifest.sources["all"]
        assert source.bad == {
            "empty": 1,
            "invalid_json": 1,
            "invalid_utf8": 1,
            "missing_field": 1,
            "not_a_string": 1,
        }
        assert (source.records, source.documents) == (50, 45)
        rows = [
            json.loads(row)
            for row in (result.folder / "bad_records.jsonl").read_text().splitlines()
        ]
        assert [row["line"] - 1 for row in rows] == list(bad)
        content = path.read_bytes()
        assert all(content[row["byte"] :].startswith(bad[row["line"] - 1]) for row in rows)
    with pytest.raises(DataError, match=r"mixed\.jsonl.*invalid_json.*--on-bad skip"):
        build(section(path, on_bad="fail"), Output(work / "fail"))
    with pytest.raises(
        DataError, match=r"4 of 50 records are bad.*--max-bad-share 0\.05 allows less"
    ):
        build(section(path), Output(work / "share"))
    assert not (work / "share" / "manifest.json").exists()
    assert not build(section(path, max_bad_share=0.1), Output(work / "share")).reused


def test_nothing_but_bad_records_is_an_error_that_names_the_reasons(work: Path) -> None:
    with pytest.raises(
        DataError, match="source 'all': 2 of 2 records are bad.*missing_field.*--text-field"
    ):
        build(
            section(jsonl(work / "a.jsonl", [{"text": None}, {"content": "y"}])),
            Output(work / "data"),
        )


def test_a_source_that_changes_under_the_build_leaves_nothing(
    work: Path, text_config: TextConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = coordinator.encode_unit

    def restless(job: Any) -> Any:
        with Path("raw/000.txt").open("a") as stream:
            stream.write("more\n")
        return original(job)

    monkeypatch.setattr(coordinator, "encode_unit", restless)
    with pytest.raises(DataError, match="changed while they were read"):
        build(text_config("raw/*.txt"), Output(work / "data"))
    assert list(contents_but_staging(work / "data")) == []


def contents_but_staging(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".building"}


def test_two_builds_in_one_folder_are_refused(work: Path, text_config: TextConfig) -> None:
    (work / "data").mkdir()
    descriptor = os.open(work / "data", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(ConfigError, match="another process is writing"):
        build(text_config("raw/*.txt"), Output(work / "data"))
    os.close(descriptor)
    build(text_config("raw/*.txt"), Output(work / "data"))


def test_an_output_that_is_a_file_is_refused(work: Path, text_config: TextConfig) -> None:
    with pytest.raises(StorageError, match="cannot create the folder"):
        build(text_config("raw/*.txt"), Output(work / "raw" / "000.txt"))


def stopped_after(
    units: int, monkeypatch: pytest.MonkeyPatch, config: DataConfig, output: Output
) -> None:
    """A build that dies after so many units, as a killed one does."""
    original, done = coordinator.encode_unit, iter(range(units))

    def mortal(job: Any) -> Any:
        if next(done, None) is None:
            raise KeyboardInterrupt
        return original(job)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(coordinator, "encode_unit", mortal)
        build(config, output)


def test_finished_units_of_a_stopped_build_are_not_encoded_again(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = section(jsonl(work / "many.jsonl", DOCUMENTS), unit_bytes=1000)
    clean: BuildResult = build(config, Output(work / "clean"))
    stopped_after(5, monkeypatch, config, Output(work / "data"))
    encoded: list[int] = []
    original = coordinator.encode_unit
    monkeypatch.setattr(
        coordinator, "encode_unit", lambda job: encoded.append(job[1]) or original(job)
    )
    build(config, Output(work / "data"))
    assert min(encoded) == 5
    assert contents(work / "data") == contents(clean.folder)


def test_a_build_without_plugins_is_known_by_request_and_input_alone(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = section(jsonl(work / "many.jsonl", DOCUMENTS), unit_bytes=1000)
    stopped_after(5, monkeypatch, config, Output(work / "data"))
    identity = json.loads((work / "data" / ".building" / "identity.json").read_text())
    assert set(identity) == {"request_sha256", "inputs_sha256"}


WRONG_UNITS: dict[str, tuple[Callable[[list[Unit]], Any], str]] = {
    "no list": (lambda units: None, "None is among them, which is no Unit"),
    "no units": (lambda units: ["many.jsonl"], "'many.jsonl' is among them"),
    "another source": (
        lambda units: [replace(unit, source="mine") for unit in units],
        "names the source 'mine', not its own",
    ),
    "a text for the files": (
        lambda units: [replace(unit, files=unit.files[0]) for unit in units],
        "not a tuple of texts",
    ),
    "a unit twice": (lambda units: [*units, units[1]], "from 1000 on twice"),
    "ranges that overlap": (
        lambda units: [units[0], replace(units[1], start=990), *units[2:]],
        "from 990 on twice",
    ),
    "a whole file and its end": (
        lambda units: [replace(units[0], end=None), units[-1]],
        "many.jsonl from ",
    ),
    "a range twice without a file": (
        lambda units: [replace(unit, files=()) for unit in (units[0], units[0])],
        "the part from 0 on twice",
    ),
}


@pytest.mark.parametrize("case", WRONG_UNITS)
def test_units_that_cannot_be_used_are_refused(
    work: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    config = section(jsonl(work / "many.jsonl", DOCUMENTS), unit_bytes=1000)
    change, expected = WRONG_UNITS[case]
    original = Jsonl.units
    monkeypatch.setattr(Jsonl, "units", lambda self, size: change(original(self, size)))
    with pytest.raises(ConfigError, match="source 'all', of kind 'jsonl', cannot be used") as error:
        build(config, Output(work / "data"))
    assert expected in str(error.value)
    assert "correct units() of data_pipeline.sources.jsonl.Jsonl" in str(error.value)


def test_units_may_be_yielded(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = section(jsonl(work / "many.jsonl", DOCUMENTS), unit_bytes=1000)
    build(config, Output(work / "listed"))
    original = Jsonl.units
    monkeypatch.setattr(Jsonl, "units", lambda self, size: iter(original(self, size)))
    build(config, Output(work / "data"))
    assert contents(work / "data") == contents(work / "listed")


def test_units_written_before_a_restart_of_the_machine_are_checked(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = section(jsonl(work / "many.jsonl", DOCUMENTS), unit_bytes=1000)
    clean = build(config, Output(work / "clean"))
    stopped_after(5, monkeypatch, config, Output(work / "data"))
    part = next(
        path
        for path in sorted((work / "data" / ".building" / "units").rglob("train.bin"))
        if path.stat().st_size
    )
    part.write_bytes(bytes(part.stat().st_size))  # what a power cut may leave
    monkeypatch.setattr(units, "boot_id", lambda: "another")
    build(config, Output(work / "data"))
    assert contents(work / "data") == contents(clean.folder)


def test_a_stopped_build_of_other_data_is_not_taken_up(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_after(
        5,
        monkeypatch,
        section(jsonl(work / "many.jsonl", DOCUMENTS), unit_bytes=1000),
        Output(work / "data"),
    )
    other = section(jsonl(work / "other.jsonl", DOCUMENTS[::-1]), unit_bytes=1000)
    clean = build(other, Output(work / "clean"))
    build(other, Output(work / "data"))
    assert contents(work / "data") == contents(clean.folder)


def test_the_tokenizer_is_trained_on_the_sources_by_weight(work: Path) -> None:
    sources = {
        "words": {
            "kind": "jsonl",
            "input": [
                str(
                    jsonl(
                        work / "a.jsonl",
                        [f"hello world again and again {n}" * 9 for n in range(30)],
                    )
                )
            ],
        },
        "digits": {
            "kind": "jsonl",
            "input": [
                str(jsonl(work / "b.jsonl", [f"31415926 27182818 {n}" * 9 for n in range(30)]))
            ],
        },
    }
    alone = build(
        section(work / "a.jsonl", source=sources["words"]), Output(work / "alone")
    ).manifest.tokenizer
    for name, weights in (("words", {"words": 1.0}), ("both", None)):
        tokenizer = {"kind": "train_bpe", "vocab_size": 300, "sample_weights": weights}
        config = section(work / "a.jsonl", source=None, sources=sources, tokenizer=tokenizer)
        found = build(config, Output(work / name)).manifest.tokenizer
        assert (found.sha256 == alone.sha256) == (weights is not None)
    wrong = {"kind": "train_bpe", "sample_weights": {"wrods": 1.0}}
    with pytest.raises(
        ConfigError, match="names the source 'wrods', but the sources are words, digits"
    ):
        build(
            section(work / "a.jsonl", source=None, sources=sources, tokenizer=wrong),
            Output(work / "wrong"),
        )


def test_a_small_sample_trains_on_some_documents_only(work: Path) -> None:
    path = jsonl(work / "many.jsonl", DOCUMENTS)
    whole = build(section(path, unit_bytes=1000), Output(work / "whole")).manifest
    sampled = {"kind": "train_bpe", "vocab_size": 300, "sample_bytes": 2000}
    twice = [
        build(section(path, unit_bytes=1000, tokenizer=sampled), Output(work / name)).manifest
        for name in ("one", "two")
    ]
    assert twice[0].tokenizer == twice[1].tokenizer != whole.tokenizer
    assert twice[0].splits["train"].documents == whole.splits["train"].documents
