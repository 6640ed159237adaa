"""Which files of a folder are read, against the package datasets, on random folders; and the
documents, against pyarrow, pandas and json.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
from pathlib import Path
from typing import Any

import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.sources.folder_walk import say
from data_pipeline.sources.guess import sources_of
from pretrain.core.errors import PipelineError
from tests.support.source_reading import read_all, texts

SPLIT_WORDS = [
    "train",
    "training",
    "validation",
    "valid",
    "dev",
    "val",
    "test",
    "testing",
    "eval",
    "evaluation",
]
OTHER_WORDS = ["part", "restrain", "latest", "x", "2020", "devil"]
ENDINGS = {
    "parquet": ".parquet",
    "jsonl": ".jsonl",
    "csv": ".csv",
    "tsv": ".tsv",
    "arrow": ".arrow",
}


def write_table(path: Path, rows: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"n": list(range(len(rows))), "text": rows}), path)
    elif path.suffix == ".arrow":
        with (
            pa.OSFile(str(path), "wb") as sink,
            pa.ipc.new_stream(sink, pa.schema({"text": pa.string()})) as writer,
        ):
            writer.write_table(pa.table({"text": rows}))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    else:
        pandas.DataFrame({"text": rows}).to_csv(
            path, index=False, sep="\t" if path.suffix == ".tsv" else ","
        )


def read_table(path: str) -> list[str]:
    """The oracle's reading of a file."""
    match os.path.splitext(path)[1]:
        case ".parquet":
            return pandas.read_parquet(path)["text"].tolist()
        case ".arrow":
            with pa.OSFile(path) as source:
                return pa.ipc.open_stream(source).read_all()["text"].to_pylist()
        case ".jsonl":
            return [json.loads(line)["text"] for line in Path(path).read_text().splitlines()]
        case ending:
            return pandas.read_csv(path, sep="\t" if ending == ".tsv" else ",", dtype=str)[
                "text"
            ].tolist()


def random_name(source: random.Random, style: str, ending: str) -> str:
    word = source.choice([*SPLIT_WORDS, *["train"] * 10] if source.random() < 0.9 else OTHER_WORDS)
    match style:
        case "sharded":
            return f"data/{word}-{source.randrange(3):05}-of-00003{ending}"
        case "folders":
            return f"{source.choice(['', 'data/', 'en/'])}{word}{source.choice(['', '', '_v2'])}/{source.choice('abc')}{ending}"
        case "names":
            return f"{source.choice(['', 'raw/'])}{source.choice(['', 'c4-', 'my.', 'a'])}{word}{source.choice(['', '-1', '.00', '_x', 's'])}{ending}"
    return f"{source.choice(['', 'data/', '2020/'])}{source.choice(OTHER_WORDS)}{source.randrange(5)}{ending}"


def random_folder(root: Path, source: random.Random, number: int) -> list[str]:
    """A folder of data files of one kind, with stray files among them; returns the data files."""
    style, ending = (
        source.choice(["sharded", "folders", "names", "plain"]),
        ENDINGS[source.choice(list(ENDINGS))],
    )
    names = sorted(
        {
            random_name(source, style if source.random() < 0.95 else "names", ending)
            for _ in range(source.randint(1, 5))
        }
    )
    for name in names:
        write_table(
            root / name, [f"text {number} {name} {row}" for row in range(source.randint(1, 3))]
        )
    for name, content in {
        "README.md": "# About\n",
        "LICENSE": "free",
        ".gitattributes": "*",
        ".git/train.jsonl": "{}",
        "_SUCCESS": "",
    }.items():
        if source.random() < 0.5:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(content)
    if source.random() < 0.3:
        write_table(root / f".cache/huggingface/download/train{ending}", ["hidden"])
    return names


def outcome_of(root: Path) -> list[str] | str:
    """The texts that a build would read, or why it would not begin."""
    try:
        return [
            text
            for section in sources_of([str(root)], None).values()
            for text in texts(read_all(section))
        ]
    except PipelineError as error:
        return str(error)


def splits_of_the_package(root: Path, cache: Path) -> dict[str, list[str]]:
    datasets = pytest.importorskip("datasets")
    try:
        builder = datasets.load_dataset_builder(str(root), cache_dir=str(cache))
    except (datasets.exceptions.DatasetNotFoundError, FileNotFoundError, ValueError) as error:
        raise AssertionError(
            f"the package reads nothing in {sorted(root.rglob('*'))}: {error}"
        ) from error
    return {
        str(split): list(map(str, files))
        for split, files in (builder.config.data_files or {}).items()
    }


# The package takes a tenth of a second for a folder.
@pytest.mark.parametrize("folders", [80, pytest.param(600, marks=pytest.mark.full)])
def test_random_folders_are_read_as_the_package_does_or_refused_if_it_loses_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, folders: int
) -> None:
    source = random.Random(folders)
    counts = {"train": 0, "no splits": 0, "refused": 0}
    for number in range(folders):
        root = tmp_path / str(number)
        names = random_folder(root, source, number)
        theirs = splits_of_the_package(root, tmp_path / "cache")
        listed = [file for files in theirs.values() for file in files]
        ours = outcome_of(root)
        is_whole = sorted(listed) == sorted(str(root / name) for name in names)
        if isinstance(ours, str):
            counts["refused"] += 1
            # They would leave files unread, or read some for two splits, or have nothing to train
            # on.
            assert not is_whole or "train" not in theirs, (names, theirs, ours)
            continue
        counts["train" if len(theirs) > 1 else "no splits"] += 1
        if is_whole:  # the train split, or the only one there is
            assert "train" in theirs or len(theirs) == 1, (names, theirs)
            expected = theirs.get("train") or next(iter(theirs.values()))
            assert ours == [text for path in sorted(expected) for text in read_table(path)], (
                names,
                theirs,
            )
        # some files have a split by their folder, some by their own name; the package takes only
        # the former
        else:
            expected = [str(root / name) for name in names if is_train(name)]
            assert ours == [text for path in expected for text in read_table(path)], (names, theirs)
        unread = len(names) - len({text.split()[2] for text in ours})
        said = [
            record.getMessage()
            for record in caplog.records
            if record.getMessage().startswith(f"{root}: ")
        ]
        assert bool(unread) == any(
            "of split" in message.partition("not read")[2] for message in said
        ), (names, said)
        caplog.clear()
    assert min(counts.values()) > folders // 10, counts


def is_train(name: str) -> bool:
    if shard := re.fullmatch(
        r"data/(\w+)-\d{5}-of-\d{5}\.\w+", name
    ):  # a split may have any name there
        return shard[1] == "train"
    *folders, last = [re.split(r"[-._ 0-9]", part) for part in name.split("/")]
    in_folders = [word for words in folders for word in words if word in SPLIT_WORDS]
    return any(word in ("train", "training") for word in in_folders or last)


def random_card(
    source: random.Random, names: list[str]
) -> tuple[str, dict[str, dict[str, list[str]]]]:
    """A README.md that declares configs over the files, in one of the hub's ways to write them."""
    configs: dict[str, dict[str, list[str]]] = {}
    lines = ["---", "license: mit", "configs:"]
    for config in source.sample(["default", "en", "de-small", "no"], source.randint(1, 3)):
        form = source.choice(["string", "list", "splits"])
        chosen = source.sample(names, source.randint(1, len(names)))
        lines.append(f"- config_name: '{config}'")
        if form == "string":
            lines.append(f"  data_files: {chosen[0]}")
            configs[config] = {"train": chosen[:1]}
        elif form == "list":
            lines += ["  data_files:", *[f"  - {name}" for name in chosen]]
            configs[config] = {"train": chosen}
        else:
            cut = source.randint(1, len(chosen))
            parts = {"train": chosen[:cut], "test": chosen[cut:]}
            lines.append("  data_files:")
            for split, files in parts.items():
                if files:
                    lines += [f"  - split: {split}", f"    path: [{', '.join(files)}]"]
            configs[config] = {split: files for split, files in parts.items() if files}
    return "\n".join([*lines, "---", "# Card", ""]), configs


def test_declared_configs_are_read_as_the_package_reads_them(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    source = random.Random(5)
    outcomes = {"read": 0, "refused": 0}
    for number in range(15):
        root, ending = tmp_path / str(number), source.choice(list(ENDINGS.values()))
        names = sorted(
            {
                f"{source.choice(['a', 'b/c', 'test'])}/{word}{ending}"
                for word in source.sample(OTHER_WORDS + SPLIT_WORDS, 4)
            }
        )
        for name in names:
            write_table(root / name, [f"{name} {row}" for row in range(2)])
        card, configs = random_card(source, names)
        (root / "README.md").write_text(card)
        for config in [None, *configs]:
            try:
                builder = datasets.load_dataset_builder(
                    str(root), config, cache_dir=str(tmp_path / "cache")
                )
            except ValueError as error:
                assert config is None and "Config name is missing" in str(error)
                outcomes["refused"] += 1
                with pytest.raises(
                    PipelineError, match="several configs .* choose one with --dataset-config"
                ):
                    sources_of([str(root)], None, config)
                continue
            for split, files in builder.config.data_files.items():
                (section,) = sources_of([str(root)], None, config, str(split)).values()
                assert texts(read_all(section)) == [
                    text for path in files for text in read_table(path)
                ], (card, config, split)
                outcomes["read"] += 1
    assert min(outcomes.values()) > 3, outcomes


def test_what_save_to_disk_wrote_is_read_as_the_package_reads_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict(
        {"text": [f"row {row}" for row in range(50)], "other": list(range(50))}
    )
    table.select(range(40, 5, -1)).save_to_disk(tmp_path / "table", num_shards=3)
    datasets.DatasetDict(train=table, test=table.select([3])).save_to_disk(tmp_path / "splits")
    datasets.DatasetDict(dev=table).save_to_disk(tmp_path / "no_train")

    def read(name: str, **options: Any) -> list[str]:
        (section,) = sources_of([str(tmp_path / name)], None, **options).values()
        assert section["kind"] == "datasets"
        return texts(read_all(section))

    assert read("table") == datasets.load_from_disk(str(tmp_path / "table"))["text"][:]
    assert read("splits") == table["text"][:]
    assert "the split train is read; not read: test" in caplog.text
    assert read("splits", split="test") == ["row 3"]
    with pytest.raises(
        PipelineError, match=r"no split 'train' \(it has dev\): choose one with .*--dataset-split"
    ):
        read("no_train")
    with pytest.raises(PipelineError, match="save_to_disk .* --format datasets"):
        read_all({"kind": "arrow", "input": [str(tmp_path / "table")]})
    # One split of it alone is a saved table too; and the files can be read as what they are.
    assert read("splits/test") == ["row 3"]
    shards = {"kind": "arrow", "input": [str(tmp_path / "table/data-*.arrow")]}
    assert texts(read_all(shards)) == read("table")


@pytest.fixture(autouse=True)
def said_again(caplog: pytest.LogCaptureFixture) -> None:
    say.cache_clear()
    caplog.set_level(logging.WARNING)
