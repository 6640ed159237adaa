"""Shards of other programs as data folders: the same tokens as Megatron-Core's own reader gives,
and damage by name.
"""

from __future__ import annotations

import itertools
import json
import os
import struct
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch

from data_pipeline.config import DataConfig
from data_pipeline.preprocess import convert_shard as shard_import
from data_pipeline.preprocess.import_shards import ImportResult, import_shards
from data_pipeline.preprocess.workspace import Output
from data_pipeline.shards.foreign import open_foreign
from data_pipeline.shards.inspection import check_everything
from data_pipeline.shards.manifest import load_manifest
from data_pipeline.shards.token_stream import open_split
from data_pipeline.tokenizer.config import TrainBPE
from data_pipeline.tokenizer.training import train_bpe
from pretrain.core.errors import ConfigError, DataError, StorageError

with warnings.catch_warnings():  # Megatron misses optional CUDA packages, aloud
    warnings.simplefilter("ignore")
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

TEXTS = [
    f"document {number}: " + "λάμδα mü 中文 plain words 🙂 " * (number % 7 + 1)
    for number in range(60)
]
Documents = list[list[int]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_bytes(train_bpe(TEXTS, TrainBPE(vocab_size=400)).content)
    return path


@pytest.fixture(scope="module")
def documents(tokenizer: Path) -> Documents:
    """The texts in ids, each with the end-of-document token 0 behind it."""
    library = tokenizers.Tokenizer.from_file(str(tokenizer))
    return [[*library.encode(text).ids, 0] for text in TEXTS]


def config(tokenizer: Path, share: float = 0.0, **policy: object) -> DataConfig:
    section = {"kind": "file", "path": str(tokenizer)} | policy
    return DataConfig.model_validate({"tokenizer": section, "validation_share": share})


def megatron(
    prefix: Path,
    documents: Documents,
    dtype: type = np.uint16,
    sequences: int = 1,
    multimodal: bool = False,
) -> str:
    """Shards as Megatron-Core writes them; each document in so many sequences."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype, multimodal=multimodal)
    for document in documents:
        cuts = [len(document) * part // sequences for part in range(sequences + 1)]
        for begin, end in itertools.pairwise(cuts):
            item = torch.tensor(document[begin:end], dtype=torch.int64)
            builder.add_item(item, mode=0) if multimodal else builder.add_item(item)
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def nanotron(
    prefix: Path, documents: Documents, width: int = 2, metadata: str | None = None
) -> str:
    """As datatrove's writer: tokens, document ends, and the tokenizer's name with the number of
    tokens.
    """
    prefix.parent.mkdir(parents=True, exist_ok=True)
    tokens = [token for document in documents for token in document]
    Path(f"{prefix}.ds").write_bytes(struct.pack(f"<{len(tokens)}{'HI'[width == 4]}", *tokens))
    ends = np.cumsum([len(document) for document in documents]).tolist()
    Path(f"{prefix}.ds.index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))
    Path(f"{prefix}.ds.metadata").write_text(
        metadata or f"gpt2|{width}\n{len(tokens)}\n{len(tokens) / 1e3:.1f} KT"
    )
    return f"{prefix}.ds"


def flat(documents: Documents) -> list[int]:
    return [token for document in documents for token in document]


def read_back(folder: Path, split: str = "train") -> Documents:
    """What training reads: tokens, and where documents begin."""
    stream = open_split(load_manifest(folder), split)
    starts = stream.document_starts(0, stream.num_tokens).tolist()
    return [part.tolist() for part in np.split(stream.read(0, stream.num_tokens), starts[1:])]


def run(
    prefixes: list[str],
    folder: Path,
    given: DataConfig,
    validation: list[str] | None = None,
    fresh: bool = False,
) -> ImportResult:
    return import_shards(prefixes, validation or [], given, Output(folder), fresh)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint16])
@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize("multimodal", [False, True])
def test_megatrons_shards_give_the_tokens_that_megatron_core_reads(
    tmp_path: Path,
    tokenizer: Path,
    documents: Documents,
    dtype: type,
    sequences: int,
    multimodal: bool,
) -> None:
    if np.dtype(dtype).itemsize == 1:  # of these ids, those that fit
        documents = [[token % 128 for token in document] for document in documents]
    prefix = megatron(tmp_path / "old", documents, dtype, sequences, multimodal)
    result = run([prefix], tmp_path / "data", config(tokenizer))
    dataset = IndexedDataset(prefix, multimodal=multimodal)
    items = [
        dataset[number][0] if multimodal else dataset[number] for number in range(len(dataset))
    ]
    marks = dataset.document_indices.tolist()
    expected = [
        np.concatenate(items[begin:end]).tolist() for begin, end in itertools.pairwise(marks)
    ]
    assert read_back(tmp_path / "data") == expected == documents
    assert [
        document.tolist() for document in IndexedDataset(str(tmp_path / "data" / "train"))
    ] == documents
    assert check_everything(load_manifest(tmp_path / "data"), lambda _: None) == []
    linked = os.path.samefile(f"{prefix}.bin", tmp_path / "data" / "train.bin")
    assert linked == (dtype in (np.uint16, np.int32)) == (result.how == {"linked": 1})


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize(
    "metadata", [None, "older/tokenizer\n", "Unknown Tokenizer|{width}|{width}\n{tokens}\n1 KT"]
)
def test_nanotrons_shards_are_linked(
    tmp_path: Path, tokenizer: Path, documents: Documents, width: int, metadata: str | None
) -> None:
    said = metadata.format(width=width, tokens=len(flat(documents))) if metadata else None
    prefix = nanotron(tmp_path / "part_00000", documents, width, said)
    result = run([prefix], tmp_path / "data", config(tokenizer))
    assert read_back(tmp_path / "data") == documents and result.how == {"linked": 1}
    assert os.path.samefile(prefix, tmp_path / "data" / "train.bin")
    assert (
        result.manifest.dtype == {2: "uint16", 4: "int32"}[width]
        and result.manifest.tokenizer.append_eod
    )
    assert check_everything(load_manifest(tmp_path / "data"), lambda _: None) == []


def test_nanogpts_and_llm_cs_files_are_cut_at_the_end_of_document_token(
    tmp_path: Path, tokenizer: Path, documents: Documents
) -> None:
    np.array(flat(documents), "<u2").tofile(tmp_path / "nano.bin")
    nano = run([str(tmp_path / "nano.bin")], tmp_path / "nano", config(tokenizer))
    assert nano.how == {"linked": 1} and "60 documents, cut at the token 0" in nano.notes[0]
    assert read_back(tmp_path / "nano") == documents
    before = [[0, *document[:-1]] for document in documents]  # llm.c puts the token in front
    for name, magic, version, dtype in (
        ("short", 20240520, 1, "<u2"),
        ("long", 20240801, 7, "<u4"),
    ):
        header = np.zeros(256, "<i4")
        header[:3] = magic, version, len(flat(before))
        (tmp_path / f"{name}.bin").write_bytes(
            header.tobytes() + np.array(flat(before), dtype).tobytes()
        )
        result = run([str(tmp_path / f"{name}.bin")], tmp_path / name, config(tokenizer))
        assert read_back(tmp_path / name) == before and result.how == {"converted": 1}
        assert not result.manifest.tokenizer.append_eod
        assert check_everything(load_manifest(tmp_path / name), lambda _: None) == []


def test_text_bytes_are_those_of_the_texts(
    tmp_path: Path, tokenizer: Path, documents: Documents
) -> None:
    result = run([megatron(tmp_path / "old", documents)], tmp_path / "data", config(tokenizer))
    size = sum(len(text.encode("utf-8")) for text in TEXTS)
    assert (
        result.manifest.splits["train"].utf8_bytes
        == result.manifest.sources["all"].utf8_bytes
        == size
    )


def test_text_bytes_of_a_tokenizer_with_byte_fallback_are_found_by_decoding(tmp_path: Path) -> None:
    tokens = [
        "<unk>",
        "</s>",
        *(f"<0x{number:02X}>" for number in range(256)),
        "▁",
        *"abcdefghijklmnopqrstuvwxyz",
    ]
    model = tokenizers.models.BPE(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=[],
        byte_fallback=True,
        unk_token="<unk>",
    )
    library = tokenizers.Tokenizer(model)
    library.add_special_tokens(["<unk>", "</s>"])
    library.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    parts = tokenizers.decoders
    steps = [
        parts.Replace("▁", " "),
        parts.ByteFallback(),
        parts.Fuse(),
        parts.Strip(" ", 1, 0),
    ]  # as Llama's
    library.decoder = tokenizers.decoders.Sequence(steps)
    library.save(str(tmp_path / "tokenizer.json"))
    ids = [[*library.encode(text).ids, 1] for text in TEXTS]
    assert library.token_to_id("<0xCE>") in ids[0]
    result = run(
        [megatron(tmp_path / "old", ids)], tmp_path / "data", config(tmp_path / "tokenizer.json")
    )
    assert result.manifest.splits["train"].utf8_bytes == sum(
        len(text.encode("utf-8")) for text in TEXTS
    )


def test_what_stands_around_documents_is_found_out(
    tmp_path: Path, tokenizer: Path, documents: Documents
) -> None:
    plain = [document[:-1] for document in documents]
    result = run([megatron(tmp_path / "plain", plain)], tmp_path / "none", config(tokenizer))
    assert (
        not result.manifest.tokenizer.append_eod and "0 of 60 documents end with" in result.notes[0]
    )
    mixed = run(
        [megatron(tmp_path / "mixed", plain[:20] + documents[20:])],
        tmp_path / "mixed_data",
        config(tokenizer),
    )
    assert (
        not mixed.manifest.tokenizer.append_eod and "40 of 60 documents end with" in mixed.notes[0]
    )
    both = run(
        [megatron(tmp_path / "both", [[5, *document] for document in documents])],
        tmp_path / "both_data",
        config(tokenizer, bos_token="$"),
    )
    with_dollar = tokenizers.Tokenizer.from_file(str(tokenizer)).token_to_id("$")
    assert both.manifest.tokenizer.append_eod and both.manifest.tokenizer.prepend_bos == (
        with_dollar == 5
    )


def test_several_shards_keep_their_order_and_share_a_type(
    tmp_path: Path, tokenizer: Path, documents: Documents
) -> None:
    prefixes = [
        megatron(tmp_path / "a", documents[:20], np.int32),
        nanotron(tmp_path / "b", documents[20:45], 2),
        megatron(tmp_path / "c", documents[45:50], np.int64),
    ]
    held_out = megatron(tmp_path / "v", documents[50:], np.uint16)
    result = run(prefixes, tmp_path / "data", config(tokenizer), [held_out])
    assert (
        read_back(tmp_path / "data") == documents[:50]
        and read_back(tmp_path / "data", "validation") == documents[50:]
    )
    assert result.manifest.dtype in ("uint16", "int32") and sum((result.how or {}).values()) == 4
    assert [shard.prefix for shard in result.manifest.splits["train"].shards] == [
        "train_00000",
        "train_00001",
        "train_00002",
    ]
    assert (result.largest_id, result.reused) == (max(flat(documents)), False)
    assert run(prefixes, tmp_path / "data", config(tokenizer), [held_out]).reused


@pytest.mark.parametrize("read_tokens", [1 << 20, 100])
def test_a_share_is_held_out_by_content_whatever_the_form(
    tmp_path: Path,
    tokenizer: Path,
    documents: Documents,
    monkeypatch: pytest.MonkeyPatch,
    read_tokens: int,
) -> None:
    for module in (shard_import, __import__("data_pipeline.shards.foreign", fromlist=["x"])):
        monkeypatch.setattr(
            module, "READ_TOKENS", read_tokens
        )  # documents of 30 to 300 tokens are read in parts
    repeated = documents * 2  # equal documents must not be on both sides
    held = []
    for name, prefix in (
        ("one", megatron(tmp_path / "one_old", repeated, np.uint16, 2)),
        ("two", nanotron(tmp_path / "two_old", repeated, 4)),
    ):
        result = run([prefix], tmp_path / name, config(tokenizer, share=0.3))
        train, validation = read_back(tmp_path / name), read_back(tmp_path / name, "validation")
        assert sorted(train + validation) == sorted(repeated) and result.how == {"converted": 1}
        assert not {tuple(document) for document in train} & {
            tuple(document) for document in validation
        }
        assert train == [document for document in repeated if document not in validation]
        assert check_everything(load_manifest(tmp_path / name), lambda _: None) == []
        held.append(validation)
    assert held[0] == held[1] and 10 < len(held[0]) < 70


def test_empty_documents_are_left_out_and_counted(
    tmp_path: Path, tokenizer: Path, documents: Documents
) -> None:
    result = run(
        [nanotron(tmp_path / "old", [[], documents[0], [], documents[1], []])],
        tmp_path / "data",
        config(tokenizer),
    )
    assert read_back(tmp_path / "data") == documents[:2]
    assert (
        result.manifest.sources["all"].left_out == {"empty": 3}
        and result.manifest.sources["all"].records == 5
    )
    assert result.manifest.tokenizer.append_eod


def damaged(change: Callable[[Path], None]) -> Callable[[Path, Documents], str]:
    def make(folder: Path, documents: Documents) -> str:
        prefix = megatron(folder / "old", documents)
        change(folder / "old")
        return prefix

    return make


def patch(suffix: str, offset: int, data: bytes) -> Callable[[Path], None]:
    def change(prefix: Path) -> None:
        path = prefix.with_name(prefix.name + suffix)
        content = bytearray(path.read_bytes())
        content[offset : offset + len(data)] = data
        path.write_bytes(bytes(content))

    return change


def cut(suffix: str, size: int) -> Callable[[Path], None]:
    return lambda prefix: os.truncate(prefix.with_name(prefix.name + suffix), size)


def remove(suffix: str) -> Callable[[Path], None]:
    return lambda prefix: prefix.with_name(prefix.name + suffix).unlink()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (damaged(patch(".idx", 0, b"TNTIDX\0\0")), r"older kind TNTIDX.*--dataset-impl mmap"),
        (damaged(patch(".idx", 9, b"\2")), "index version 2"),
        (damaged(patch(".idx", 17, b"\7")), "float32"),
        (damaged(patch(".idx", 34, b"\1\0\0\0")), "offset of sequence 1"),
        (
            damaged(patch(".bin", 20, b"\xff\xff")),
            r"token id 65535 at token 10, in document 0 .* has \d+ entries",
        ),
        (damaged(cut(".bin", 101)), "101 bytes"),
        (damaged(cut(".idx", 100)), "100 bytes"),
        (damaged(remove(".bin")), "old.bin is missing"),
        (damaged(remove(".idx")), r"old.idx is missing.*name it as .*old\.bin"),
        (lambda folder, _: str(folder), "is a folder"),
        (lambda folder, _: str(folder / "nothing"), "there are no shards"),
        (
            lambda folder, found: nanotron(folder / "x", found, 2, "gpt2|4\n1\n"),
            "says 1 tokens of 4 bytes",
        ),
    ],
)
def test_what_is_wrong_is_said_with_the_file_and_leaves_nothing(
    tmp_path: Path,
    tokenizer: Path,
    documents: Documents,
    make: Callable[[Path, Documents], str],
    reason: str,
) -> None:
    given = make(tmp_path, documents)
    with pytest.raises(DataError, match=reason) as caught:
        run([given], tmp_path / "data", config(tokenizer))
    assert "--fresh" not in str(caught.value)  # nothing of ours is to be built again
    assert not (tmp_path / "data" / "manifest.json").exists()


def test_nanotrons_damaged_index_and_plain_files_of_another_type_are_refused(
    tmp_path: Path, tokenizer: Path, documents: Documents
) -> None:
    prefix = nanotron(tmp_path / "x", documents)
    index = Path(f"{prefix}.index")
    whole = index.read_bytes()
    for content, reason in (
        (whole[:-8], "its index ends at"),
        (whole[:-3], "no number of 8-byte"),
        (whole[8:16] + whole[:8] + whole[16:], "ends before"),
    ):
        index.write_bytes(content)
        with pytest.raises(DataError, match=reason):
            open_foreign(prefix)
    np.array(flat(documents), "<u4").tofile(tmp_path / "wide.bin")
    with pytest.raises(DataError, match="tokens of 4 bytes"):
        open_foreign(str(tmp_path / "wide.bin"))
    (tmp_path / "odd.bin").write_bytes(b"abc")
    with pytest.raises(DataError, match="no number of uint16"):
        open_foreign(str(tmp_path / "odd.bin"))
    (tmp_path / "llm.bin").write_bytes(np.array([20240520, 1, 7] + [0] * 253, "<i4").tobytes())
    with pytest.raises(DataError, match="7 tokens and llm.c's header need 1038"):
        open_foreign(str(tmp_path / "llm.bin"))


def test_requests_that_would_harm_are_refused(
    tmp_path: Path, tokenizer: Path, documents: Documents
) -> None:
    prefix, other = (
        megatron(tmp_path / "old" / "a", documents),
        megatron(tmp_path / "old" / "b", documents),
    )
    with pytest.raises(ConfigError, match="named twice"):
        run([prefix, f"{prefix}.bin"], tmp_path / "data", config(tokenizer))
    with pytest.raises(ConfigError, match="folder that is to be written"):
        run([prefix], tmp_path / "old", config(tokenizer))
    with pytest.raises(ConfigError, match="both say what is held out"):
        run([prefix], tmp_path / "data", config(tokenizer, share=0.1), [other])
    with pytest.raises(ConfigError, match="--tokenizer PATH"):
        run([prefix], tmp_path / "data", DataConfig())
    with pytest.raises(DataError, match="no document falls into the validation split"):
        run([prefix], tmp_path / "data", config(tokenizer, share=1e-9))
    run([prefix], tmp_path / "data", config(tokenizer))
    with pytest.raises(ConfigError, match="pass --fresh"):
        run([other], tmp_path / "data", config(tokenizer))
    before = Path(f"{prefix}.idx").read_bytes(), Path(f"{prefix}.bin").read_bytes()
    assert run([other], tmp_path / "data", config(tokenizer), fresh=True).manifest.splits[
        "train"
    ].documents == len(documents)
    assert before == (Path(f"{prefix}.idx").read_bytes(), Path(f"{prefix}.bin").read_bytes())


def test_files_that_cannot_be_linked_are_copied(
    tmp_path: Path, tokenizer: Path, documents: Documents, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    prefix = megatron(tmp_path / "old", documents)
    assert run([prefix], tmp_path / "data", config(tokenizer)).how == {"copied": 1}
    assert (
        not os.path.samefile(f"{prefix}.bin", tmp_path / "data" / "train.bin")
        and read_back(tmp_path / "data") == documents
    )


def test_a_killed_import_leaves_no_manifest_and_resumes_with_what_is_done(
    tmp_path: Path, tokenizer: Path, documents: Documents, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefixes = [
        megatron(tmp_path / f"old{number}", documents[number::3], np.int64) for number in range(3)
    ]
    done: list[int] = []
    real = shard_import._Importer.run

    def dies_at_the_third(self: shard_import._Importer) -> shard_import.ImportRecord:
        if self.job.number == 2 and len(done) < 3:
            raise StorageError("no space")
        done.append(self.job.number)
        return real(self)

    monkeypatch.setattr(shard_import._Importer, "run", dies_at_the_third)
    with pytest.raises(StorageError):
        import_shards(prefixes, [], config(tokenizer), Output(tmp_path / "data"), workers=1)
    assert {path.name for path in (tmp_path / "data").iterdir()} == {".building"} and done == [0, 1]
    done += [-1]
    import_shards(prefixes, [], config(tokenizer), Output(tmp_path / "data"), workers=1)
    assert done == [0, 1, -1, 2]
    assert read_back(tmp_path / "data") == [
        document for number in range(3) for document in documents[number::3]
    ]
    content = json.loads((tmp_path / "data" / "manifest.json").read_text())
    assert {path.name for path in (tmp_path / "data").iterdir()} == {
        "manifest.json",
        "tokenizer.json",
    } | {
        shard["prefix"] + ending
        for shard in content["splits"]["train"]["shards"]
        for ending in (".bin", ".idx")
    }
