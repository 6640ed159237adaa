"""Data sets of the Hugging Face hub, through local copies of the same shape, without a network.

Every test reads in a process of its own: the package looks at HF_HOME and HF_HUB_OFFLINE once, when
it is imported.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from data_pipeline.sources.config import DatasetsSource
from data_pipeline.sources.interface import ReadContext, open_source
from data_pipeline.sources.presets import PRESETS, fill_in
from pretrain.core.errors import ConfigError
from tests.support.source_reading import SECTION

SCRIPT = """if True:
    import json, sys
    from tests.support.source_reading import SECTION
    from data_pipeline.sources.interface import ReadContext, open_source
    from pretrain.core.errors import PipelineError
    import logging
    outcomes, said = [], []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("data_pipeline").addHandler(handler)
    for section, unit_bytes, context in json.load(sys.stdin):
        said.clear()
        try:
            source = open_source(SECTION.validate_python({"kind": "datasets", **section}), ReadContext("all", **context))
            units = source.units(unit_bytes)
            results = [result for unit in units for result in source.read(unit)]
            outcomes.append({"said": said[:], "units": [[unit.start, unit.end, unit.stamp] for unit in units], "results": results})
        except PipelineError as error:
            outcomes.append({"error": str(error), "exit_code": error.exit_code})
    print("RESULTS" + json.dumps(outcomes))
"""

WIKITEXT = [
    "",
    " = First article = \n",
    "",
    " Some text . \n",
    "",
    " = = Section = = \n",
    "",
    " a = b \n",
    "",
    " = E = mc² = \n",
    "",
    " Einstein . \n",
    " = = = Deep = = = \n",
    " = X = \n",
    " last \n",
]
ARTICLES = [
    " = First article = \n\n Some text . \n\n = = Section = = \n\n a = b \n\n",
    " = E = mc² = \n\n Einstein . \n = = = Deep = = = \n",
    " = X = \n last \n",
]

Asked = tuple[dict[str, Any], int, dict[str, Any]]


def read(home: Path, *asked: Asked) -> list[dict[str, Any]]:
    # Streams import torch where they may, which takes seconds.
    settings = {
        "USE_TORCH": "0",
        "HF_HOME": str(home / "hf"),
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        env=os.environ | settings,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.rsplit("RESULTS", 1)[1])


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def write_json_gz(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        gzip.compress("".join(json.dumps(record) + "\n" for record in records).encode())
    )


def write_readme(folder: Path, configs: dict[str, dict[str, str]]) -> None:
    lines = ["---", "configs:"]
    for config, splits in configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for split, files in splits.items():
            lines += [f"  - split: {split}", f"    path: {files}"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


def write_copies(root: Path) -> dict[str, Path]:
    """A copy of each preset's data set, with the layout and the columns of the real one and a few
    rows.
    """
    wikitext = root / "wikitext"
    for config in ("wikitext-103-raw-v1", "wikitext-2-raw-v1"):
        for split in ("train", "validation", "test"):
            write_parquet(
                wikitext / config / f"{split}-00000-of-00001.parquet",
                {
                    "text": (
                        WIKITEXT if (config, split) == ("wikitext-103-raw-v1", "train") else ["no"]
                    )
                },
            )
    write_readme(
        wikitext,
        {
            name: {split: f"{name}/{split}-*" for split in ("train", "validation", "test")}
            for name in ("wikitext-103-raw-v1", "wikitext-2-raw-v1")
        },
    )

    c4 = root / "c4"
    for name in ("train.00000-of-01024", "validation.00000-of-00008"):
        write_json_gz(
            c4 / f"en/c4-{name}.json.gz",
            [
                {"text": f"{name} {n}", "timestamp": "2019-04-25T12:57:54Z", "url": f"https://{n}"}
                for n in range(2)
            ],
        )
    write_json_gz(
        c4 / "en.noblocklist/c4-train.00000-of-01024.json.gz",
        [{"text": "no", "timestamp": "", "url": ""}],
    )
    write_readme(
        c4,
        {
            "en": {"train": "en/c4-train.*.json.gz", "validation": "en/c4-validation.*.json.gz"},
            "en.noblocklist": {"train": "en.noblocklist/c4-train.*.json.gz"},
        },
    )

    zyda = root / "zyda"
    write_parquet(
        zyda / "sample/100BT/000_00000.parquet", {"text": ["zyda"], "nemo_id": ["dclm-gs1-fo0-1"]}
    )
    write_parquet(
        zyda / "data/fwe3/CC-MAIN-2013-20/0.parquet",
        {"text": ["no"], "nemo_id": ["x"], "dump": ["y"]},
    )
    write_readme(
        zyda, {"default": {"train": "data/*/*/*"}, "sample-100BT": {"train": "sample/100BT/*"}}
    )

    code = {
        "repo_name": "a/b",
        "path": "c.py",
        "copies": "1",
        "size": "9",
        "license": "mit",
        "hash": 7,
        "line_mean": 9.0,
        "line_max": 9,
        "alpha_frac": 0.5,
    }
    for side in ("train", "valid"):
        write_json_gz(
            root / f"code-{side}/file-000000000001.json.gz",
            [code | {"content": f"print({side!r})\n", "autogenerated": False}],
        )

    fineweb = root / "fineweb"
    columns = {
        "dump": ["CC-MAIN-2013-20"],
        "url": ["u"],
        "date": ["d"],
        "file_path": ["f"],
        "language": ["en"],
        "language_score": [0.9],
        "token_count": [2],
    }
    write_parquet(
        fineweb / "sample/10BT/000_00000.parquet",
        {"text": ["fine web"], "id": ["<urn:uuid:1>"], **columns},
    )
    write_parquet(
        fineweb / "data/CC-MAIN-2013-20/000_00000.parquet",
        {"text": ["no"], "id": ["no"], **columns},
    )
    write_readme(
        fineweb, {"default": {"train": "data/*/*"}, "sample-10BT": {"train": "sample/10BT/*"}}
    )

    stack = root / "stack"
    for language in ("python", "go"):
        write_parquet(
            stack / f"data/{language}/data-00000-of-00001.parquet",
            {
                "hexsha": [f"sha {language}"],
                "size": [3],
                "ext": ["x"],
                "lang": [language],
                "content": [language],
            },
        )
    pile = root / "pile"
    (pile / "train").mkdir(parents=True)
    row = {"text": "piled", "meta": {"pile_set_name": "Github"}}
    (pile / "train" / "00.jsonl.zst").write_bytes(
        pa.compress((json.dumps(row) + "\n").encode(), codec="zstd", asbytes=True)
    )
    maths = root / "maths"
    write_parquet(
        maths / "data/train-00000-of-00001.parquet",
        {"url": ["https://m"], "text": ["1 + 1 = 2"], "date": ["2023"], "metadata": ["{}"]},
    )
    instructions = root / "instructions"
    write_parquet(
        instructions / "data/train-00000-of-00001.parquet",
        {"instruction": ["add"], "input": [""], "output": ["a + b"], "prompt": ["add: a + b"]},
    )
    return {
        "wikitext_103_raw": wikitext,
        "pile_uncopyrighted": pile,
        "open_web_math": maths,
        "code_instructions_120k": instructions,
        "c4_en": c4,
        "zyda_2": zyda,
        "codeparrot_clean_train": root / "code-train",
        "codeparrot_clean_valid": root / "code-valid",
        "fineweb": fineweb,
        "the_stack": stack,
    }


def test_each_preset_reads_a_copy_of_its_data_set(tmp_path: Path) -> None:
    copies = write_copies(tmp_path)
    assert set(copies) == set(PRESETS)
    sections = {name: {"preset": name, "dataset": str(folder)} for name, folder in copies.items()}
    sections["the_stack"]["data_files"] = "data/python/*.parquet"
    asked = [
        (section | {"streaming": streaming}, 1 << 20, {})
        for section in sections.values()
        for streaming in (False, True)
    ]
    part = {"preset": "fineweb", "dataset": str(copies["fineweb"] / "sample/10BT")}
    *outcomes, of_a_part = read(tmp_path, *asked, (part, 1 << 20, {}))
    assert [document[0] for document in of_a_part["results"]] == ["fine web"]
    for number, name in enumerate(sections):
        kept, streamed = outcomes[2 * number : 2 * number + 2]
        # A row of a stream is named by its shard's file.
        for document in streamed.get("results", []):
            file, _, row = document[1].rpartition(":")
            if file.startswith(f"{copies[name]}/"):
                document[1] = f"{copies[name]}:{row}"
        assert "error" not in kept and kept["results"] == streamed["results"], (
            name,
            kept,
            streamed,
        )
        found = [tuple(document[:3]) for document in kept["results"]]
        assert (
            found
            == {
                "wikitext_103_raw": [
                    (text, f"{copies[name]}:{row}", None) for text, row in zip(ARTICLES, (1, 9, 13))
                ],
                "c4_en": [
                    (f"train.00000-of-01024 {n}", f"https://{n}", f"https://{n}") for n in range(2)
                ],
                "zyda_2": [("zyda", f"{copies[name]}:0", None)],
                "codeparrot_clean_train": [("print('train')\n", "7", "7")],
                "codeparrot_clean_valid": [("print('valid')\n", "7", "7")],
                "pile_uncopyrighted": [("piled", f"{copies[name]}:0", None)],
                "open_web_math": [("1 + 1 = 2", "https://m", "https://m")],
                "code_instructions_120k": [("add: a + b", f"{copies[name]}:0", None)],
                "fineweb": [("fine web", "<urn:uuid:1>", "<urn:uuid:1>")],
                "the_stack": [("python", "sha python", "sha python")],
            }[name]
        )
    code = 2 * list(sections).index("codeparrot_clean_train")
    assert outcomes[code]["results"][0][3] == {"repo_name": "a/b", "path": "c.py", "license": "mit"}


def test_what_a_recipe_says_goes_before_its_preset_even_once_resolved() -> None:
    config = DatasetsSource(
        kind="datasets",
        preset="c4_en",
        config="en.noblocklist",
        dataset_split="validation",
        split="train",
    )
    filled = fill_in(config)
    assert (filled.dataset, filled.config, filled.dataset_split, filled.split) == (
        "allenai/c4",
        "en.noblocklist",
        "validation",
        "train",
    )
    assert (filled.text_field, filled.id_field) == ("text", "url")
    assert fill_in(DatasetsSource.model_validate(config.model_dump())) == filled
    with pytest.raises(ValidationError, match="name a data set"):
        SECTION.validate_python({"kind": "datasets"})


def test_no_cut_divides_an_article_and_rows_keep_their_order(tmp_path: Path) -> None:
    write_parquet(tmp_path / "wiki/train.parquet", {"text": WIKITEXT * 20})
    write_parquet(tmp_path / "rows/train.parquet", {"text": [f"row {row}" for row in range(2000)]})
    wiki = {"dataset": str(tmp_path / "wiki"), "group": "wikitext_articles"}
    rows = {"dataset": str(tmp_path / "rows")}
    asked: list[Asked] = [(wiki, size, {}) for size in (1 << 20, 1, 150, 400)] + [
        (rows, size, {}) for size in (1 << 20, 1000)
    ]
    asked += [
        (wiki | {"max_documents": 7, "streaming": streaming}, 1 << 20, {})
        for streaming in (False, True)
    ]
    asked += [
        (rows | {"max_documents": 300, "streaming": streaming}, 1000, {})
        for streaming in (False, True)
    ]
    asked += [
        (wiki, 1 << 20, {"max_record_bytes": 50}),
        (rows | {"dataset_split": "train[10:20]"}, 1 << 20, {}),
    ]
    (
        whole,
        *pieces,
        plain,
        plain_pieces,
        wiki_7,
        wiki_7_streamed,
        rows_300,
        rows_300_streamed,
        short,
        sliced,
    ) = read(tmp_path, *asked)
    # The blank row between two copies of the list belongs to the article before it.
    assert [document[0].rstrip() for document in whole["results"]] == [
        article.rstrip() for article in ARTICLES
    ] * 20
    assert all(outcome["results"] == whole["results"] for outcome in pieces)
    assert [len(outcome["units"]) for outcome in (whole, pieces[0])] == [1, 60]
    assert len(plain_pieces["units"]) > 5 and plain_pieces["results"] == plain["results"]
    assert [document[0] for document in plain["results"]] == [f"row {row}" for row in range(2000)]
    assert wiki_7["results"] == wiki_7_streamed["results"] == whole["results"][:7]
    assert rows_300["results"] == rows_300_streamed["results"] == plain["results"][:300]
    assert {result[1] if len(result) > 5 else "read" for result in short["results"]} == {
        "too_long",
        "read",
    }
    assert [document[0] for document in sliced["results"]] == [
        f"row {row}" for row in range(10, 20)
    ]


def test_saved_tables_are_read_and_a_changed_one_is_noticed(tmp_path: Path) -> None:
    script = """if True:
        import sys, datasets
        table = datasets.Dataset.from_dict({"text": [f"row {n}" for n in range(9)], "n": list(range(9))})
        table.select([5, 3, 8]).save_to_disk(sys.argv[1] + "/table")
        datasets.DatasetDict(train=table, dev=table.select([1])).save_to_disk(sys.argv[1] + "/splits")
    """
    settings = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        check=True,
        capture_output=True,
        env=os.environ | settings,
    )
    table, splits = (
        {"dataset": str(tmp_path / "table")},
        {"dataset": str(tmp_path / "splits"), "dataset_split": "dev", "id_field": "n"},
    )
    asked: list[Asked] = [
        (table, 8, {}),
        (splits, 8, {}),
        (splits | {"dataset_split": "test"}, 8, {}),
    ]
    first, second, error = read(tmp_path, *asked)
    assert [document[0] for document in first["results"]] == ["row 5", "row 3", "row 8"] and len(
        first["units"]
    ) > 1
    assert second["results"] == [["row 1", "1", "1", None, None]]
    assert "choose one with 'dataset_split'" in error["error"]
    assert read(tmp_path, *asked[:2]) == [first, second]


def test_the_librarys_errors_become_one_sentence_that_says_what_to_do(tmp_path: Path) -> None:
    write_parquet(tmp_path / "copy/data/train-00000-of-00001.parquet", {"text": ["x"]})
    write_readme(tmp_path / "copy", {"one": {"train": "data/train-*"}})
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/train.parquet").write_bytes(b"PAR1 but not really PAR1")
    copy = {"dataset": str(tmp_path / "copy")}
    expected = [
        ({"preset": "c4_en"}, "HF_HUB_OFFLINE forbids the network"),
        ({"preset": "c4_en", "streaming": True}, "HF_HUB_OFFLINE forbids the network"),
        (copy | {"config": "two"}, "choose one with 'config'"),
        (copy | {"dataset_split": "test"}, "choose one with 'dataset_split'"),
        (copy | {"dataset_split": "test", "streaming": True}, "choose one with 'dataset_split'"),
        (copy | {"text_field": "body"}, "has no column 'body' (it has text)"),
        (copy | {"text_field": "body", "streaming": True}, "has no column 'body' (it has text)"),
        (copy | {"data_files": "data/nothing*"}, "check 'data_files'"),
        ({"dataset": str(tmp_path / "empty")}, "check 'data_files'"),
        ({"dataset": str(tmp_path / "gone")}, "there is no folder"),
        ({"dataset": str(tmp_path / "broken")}, "cannot be read"),
        ({"dataset": str(tmp_path / "broken"), "streaming": True}, "cannot be read"),
    ]
    asked: list[Asked] = [(section, 1 << 20, {}) for section, _ in expected]
    for (section, advice), outcome in zip(expected, read(tmp_path, *asked)):
        assert (
            outcome.get("exit_code") == 3
            and advice in outcome["error"]
            and "\n" not in outcome["error"]
        ), (section, outcome)


def test_splits_and_files_that_are_not_read_are_said_and_pointers_refused(tmp_path: Path) -> None:
    write_parquet(
        tmp_path / "copy/data/train-00000-of-00001.parquet",
        {"meta.text": ["one"], "text": [b"bytes"]},
    )
    write_parquet(
        tmp_path / "copy/data/test-00000-of-00001.parquet",
        {"meta.text": ["held out"], "text": [b"bytes"]},
    )
    write_parquet(tmp_path / "copy/more/x.parquet", {"text": ["of no split"]})
    (tmp_path / "clone").mkdir()
    (tmp_path / "clone/train.parquet").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n"
    )
    copy, cache = {"dataset": str(tmp_path / "copy")}, tmp_path / "datasets--org--name"
    (cache / "blobs").mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text("abc")
    write_parquet(cache / "snapshots/abc/train.parquet", {"text": ["from the cache"]})
    asked: list[Asked] = [
        (copy, 1 << 20, {}),
        (
            copy | {"text_field": "meta.text", "dataset_split": "test", "streaming": True},
            1 << 20,
            {},
        ),
        ({"dataset": str(tmp_path / "clone")}, 1 << 20, {}),
        ({"dataset": str(cache)}, 1 << 20, {}),
        ({"dataset": str(tmp_path / "copy/more/x.parquet")}, 1 << 20, {}),
    ]
    train, test, pointer, cached, file = read(tmp_path, *asked)
    assert [document[0] for document in train["results"]] == ["bytes"]
    assert train["said"] == [
        f"{copy['dataset']}: the split train is read; not read: test",
        (
            f"{copy['dataset']}: files of no split of this config are not read (1, such as"
            " more/x.parquet)"
        ),
    ]
    assert [document[0] for document in test["results"]] == [
        "held out"
    ] and "the split test is read; not read: train" in test["said"][0]
    assert "'git lfs pull'" in pointer["error"]
    assert [document[0] for document in cached["results"]] == ["from the cache"]
    assert "is a file: give the folder" in file["error"]


def test_articles_have_no_id_field() -> None:
    with pytest.raises(ConfigError, match="share no id"):
        open_source(
            DatasetsSource(kind="datasets", preset="wikitext_103_raw", id_field="n"),
            ReadContext("all"),
        )
