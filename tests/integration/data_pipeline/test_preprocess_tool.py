"""tools/preprocess_data.py as a user runs it."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import psutil
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers

from tests.support.fork_server import run_python
from tests.support.paths import TOOLS

TOOL = TOOLS / "preprocess_data.py"
SMALL = ["--input", "raw/*.txt", "--vocab-size", "300", "--output", "data/my"]
FILES = {
    "manifest.json",
    "tokenizer.json",
    "train.bin",
    "train.idx",
    "validation.bin",
    "validation.idx",
}


@pytest.fixture
def work(tmp_path: Path, write_corpus: Callable[..., None]) -> Path:
    write_corpus(tmp_path / "raw")
    return tmp_path


def run(
    folder: Path, *options: str, limit_file_size: int | None = None
) -> subprocess.CompletedProcess[str]:
    if limit_file_size is None:
        return run_python(TOOL, *options, cwd=folder)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_file_size, limit_file_size))

    command = [sys.executable, str(TOOL), *options]
    return subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        preexec_fn=limit,
        timeout=300,
    )


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_own_text_becomes_data_from_any_folder_and_is_reused(work: Path) -> None:
    first = run(work, *SMALL)
    assert first.returncode == 0, first.stderr
    assert files_in(work / "data" / "my") == FILES
    assert "deepspeed" in first.stdout and "data.path=data/my" in first.stdout
    again = run(work, *SMALL)
    assert again.returncode == 0 and "reused" in again.stdout


def test_json_alone_on_standard_output(work: Path) -> None:
    result = json.loads(run(work, *SMALL, "--json", "-").stdout)
    manifest = json.loads((work / "data" / "my" / "manifest.json").read_text())
    assert result["splits"] == manifest["splits"]
    assert (result["folder"], result["reused"], result["tokenizer"]["vocab_size"]) == (
        "data/my",
        False,
        300,
    )


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--input", "nothing/*.txt", "--output", "data"], 3, "nothing/*.txt matches no file"),
        (["--input", "raw/*.txt"], 2, "--output"),
        (
            ["--input", "raw/*.txt", "--output", "data", "--vocab-size", "5"],
            2,
            "data.tokenizer.vocab_size",
        ),
        (
            ["--input", "raw/*.txt", "--output", "data", "--validation-share", "1.5"],
            2,
            "data.validation_share",
        ),
        (
            ["--input", "raw/*.txt", "--output", "data", "--set", "data.tokeniser.kind=file"],
            2,
            "did you mean 'tokenizer'",
        ),
        (
            ["--input", "raw/*.txt", "--output", "data", "--tokenizer", "raw/000.txt"],
            3,
            "raw/000.txt is not a tokenizer",
        ),
        (
            ["--input", "raw/*.txt", "--output", "data", "--text-field", "body"],
            2,
            "and --input is read as text",
        ),
        (
            ["--recipe", "quickstart", "--dataset-split", "test"],
            2,
            "--dataset-split says how to read --input",
        ),
        (["--recipe", "no-such-recipe"], 2, "no recipe 'no-such-recipe'"),
        (
            ["--import-shards", "a", "--split-by", "path"],
            2,
            "--split-by does not go with --import-shards",
        ),
    ],
)
def test_bad_requests_end_with_a_sentence_and_a_code(
    work: Path, options: list[str], code: int, message: str
) -> None:
    result = run(work, *options)
    assert result.returncode == code
    assert message in result.stderr and "Traceback" not in result.stderr
    assert files_in(work) == {"raw"}


def test_other_data_is_refused_until_fresh(work: Path) -> None:
    run(work, *SMALL)
    refused = run(work, *SMALL, "--validation-share", "0.4")
    assert refused.returncode == 2 and "--fresh" in refused.stderr
    assert run(work, *SMALL, "--validation-share", "0.4", "--fresh").returncode == 0


def test_a_full_disk_ends_with_code_5_and_the_next_run_goes_on(
    work: Path, write_corpus: Callable[..., None]
) -> None:
    write_corpus(work / "raw", words=1200)
    result = run(work, *SMALL, limit_file_size=20_000)
    assert result.returncode == 5
    assert (
        "data/my" in result.stderr
        and "continues from where it stopped" in result.stderr
        and "Traceback" not in result.stderr
    )
    assert files_in(work / "data" / "my") == {".building"}
    assert run(work, *SMALL).returncode == 0
    assert files_in(work / "data" / "my") == FILES


def test_a_full_disk_leaves_older_data_as_it_was(
    work: Path, write_corpus: Callable[..., None]
) -> None:
    run(work, *SMALL)
    before = {path.name: path.read_bytes() for path in (work / "data" / "my").iterdir()}
    write_corpus(work / "raw", words=1200)
    assert run(work, *SMALL, "--fresh", limit_file_size=20_000).returncode == 5
    assert before == {
        path.name: path.read_bytes() for path in (work / "data" / "my").iterdir() if path.is_file()
    }


def megatrons_form(work: Path) -> list[str]:
    """A compressed corpus with some bad records and a tokenizer; the one-line command for it."""
    tokenizer = work / "tokenizer.json"
    if not tokenizer.exists():
        assert run(work, *SMALL).returncode == 0
        shutil.copyfile(work / "data" / "my" / "tokenizer.json", tokenizer)
    (work / "corpus").mkdir(exist_ok=True)
    for number in range(4):
        lines = [
            json.dumps({"text": f"record {number} {line} " * 50, "other": line})
            for line in range(300)
        ]
        content = "\n".join([*lines, "{broken", json.dumps({"text": 3})]) + "\n"
        (work / "corpus" / f"{number}.jsonl.zst").write_bytes(
            pyarrow.compress(content.encode(), codec="zstd", asbytes=True)
        )
    return [
        "--input",
        "corpus/*.jsonl.zst",
        "--text-field",
        "text",
        "--tokenizer",
        "tokenizer.json",
        "--append-eod",
    ]


def trains(folder: Path, printed: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run what follows the launcher's own options in a ``next:`` line."""
    words = shlex.split(printed)
    assert words[:3] == ["deepspeed", "--num_accelerators", "2"]
    return run_python(*words[3:], *options, cwd=folder)


def test_the_next_line_trains_with_the_options_of_the_build(work: Path) -> None:
    settings = (
        "data.source={kind: text, input: [raw/*.txt]}",
        "data.tokenizer.vocab_size=300",
        "data.document_mask=true",
        "run_path=my run",
    )
    options = [part for setting in settings for part in ("--set", setting)]
    built = run(work, "--recipe", "debug", *options, "--output", "data/my own", "--json", "-")
    assert built.returncode == 0, built.stderr
    done = trains(work, json.loads(built.stdout)["next"], "--set", "train.train_tokens=1024")
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    saved = (work / "my run" / "recipe.yaml").read_text()
    assert "document_mask: true" in saved and "path: data/my own" in saved


def test_the_next_line_leaves_out_what_its_recipe_does_not_take(work: Path) -> None:
    """The source of --input is not that of the recipe, and has another kind's fields."""
    built = run(
        work, *SMALL, "--set", "data.source.encoding=utf-8", "--set", "data.document_mask=true"
    )
    assert built.returncode == 0, built.stderr
    printed = built.stdout.rpartition("next: ")[2]
    assert "data.document_mask=true" in printed and "encoding" not in printed
    planned = trains(work, printed, "--dry-run")
    assert planned.returncode == 0, planned.stderr


def test_megatrons_form_writes_what_the_tokenizers_library_gives_in_input_order(work: Path) -> None:
    command = megatrons_form(work)
    result = run(work, *command, "--output-prefix", "data/corpus", "--workers", "2")
    assert result.returncode == 0, result.stderr
    assert "4 invalid_json, 4 not_a_string" in result.stdout
    library = tokenizers.Tokenizer.from_file(str(work / "tokenizer.json"))
    library.encode_special_tokens = True
    end = library.token_to_id("<|endoftext|>")
    expected = [
        [*library.encode(f"record {number} {line} " * 50, add_special_tokens=False).ids, end]
        for number in range(4)
        for line in range(300)
    ]
    with warnings.catch_warnings():  # Megatron misses optional CUDA packages, aloud
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import IndexedDataset
    dataset = IndexedDataset(str(work / "data" / "corpus"))
    assert [dataset[index].tolist() for index in range(len(dataset))] == expected
    without = run(work, *command[:-1], "--output-prefix", "data/plain", "--workers", "1")
    assert without.returncode == 0
    plain = IndexedDataset(str(work / "data" / "plain"))
    assert plain[0].tolist() == expected[0][:-1]


def test_mpirun_writes_the_same_bytes_as_one_process(work: Path) -> None:
    command = megatrons_form(work)
    assert run(work, *command, "--output-prefix", "one/corpus", "--workers", "1").returncode == 0
    mpirun = str(Path(sys.executable).parent / "mpirun")
    for ranks in (1, 3):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
        started = [
            mpirun,
            "-n",
            str(ranks),
            sys.executable,
            str(TOOL),
            *command,
            "--output-prefix",
            f"mpi{ranks}/corpus",
        ]
        result = subprocess.run(
            started, cwd=work, env=environment, capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("next: ") == 1
        for path in (work / "one").iterdir():
            assert path.read_bytes() == (work / f"mpi{ranks}" / path.name).read_bytes(), path.name


def test_a_clone_from_the_hub_is_trained_on_without_its_readme_and_held_out_rows(
    work: Path,
) -> None:
    for split, rows in (("train", 60), ("test", 5)):
        path = work / "clone" / "data" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(
            pyarrow.table({"text": [f"{split} row {row} " * 20 for row in range(rows)]}), path
        )
    (work / "clone" / "README.md").write_text("---\nlicense: mit\n---\n# About\n")
    result = run(
        work, "--input", "clone", "--vocab-size", "300", "--output", "data/clone", "--workers", "2"
    )
    assert result.returncode == 0, result.stderr
    assert (
        json.loads((work / "data" / "clone" / "manifest.json").read_text())["sources"]["all"][
            "records"
        ]
        == 60
    )
    notes = [line for line in result.stderr.splitlines() if "note: clone: " in line]
    assert (
        len(notes) == 1
        and "1 of 3 files are read (split train); not read: 1 of split test, 1 of side files, such as README.md"
        in notes[0]
    )
    refused = run(
        work,
        "--input",
        "clone",
        "--output",
        "data/clone",
        "--text-field",
        "body",
        "--dataset-split",
        "test",
    )
    assert refused.returncode == 3 and "has no column 'body' (it has text)" in refused.stderr


def test_standard_input_is_read_once_and_built(work: Path) -> None:
    content = "".join(json.dumps({"text": f"line {number} " * 20}) + "\n" for number in range(60))
    options = ("--input", "-", "--vocab-size", "300", "--output", "data/piped")
    result = run_python(TOOL, *options, cwd=work, given=content)
    assert result.returncode == 0, result.stderr
    manifest = json.loads((work / "data" / "piped" / "manifest.json").read_text())
    assert manifest["sources"]["all"]["documents"] == 60
    assert files_in(work / "data" / "piped") == FILES


def test_a_worker_that_is_killed_ends_the_build_with_code_7_and_the_next_run_goes_on(
    work: Path,
) -> None:
    write_units(work)
    with subprocess.Popen(
        [sys.executable, str(TOOL), *UNITS, "--workers", "2"],
        cwd=work,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        wait_for(process, lambda: any((work / "data" / "many" / ".building" / "units").glob("*")))
        victim = next(
            child
            for child in psutil.Process(process.pid).children()
            if "spawn_main" in " ".join(child.cmdline())
        )
        victim.kill()
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 7
    assert "a worker process was killed" in errors and "Traceback" not in errors
    assert run(work, *UNITS, "--workers", "2").returncode == 0


UNITS = [
    "--input",
    "many.jsonl",
    "--tokenizer",
    "tokenizer.json",
    "--output",
    "data/many",
    "--set",
    "data.unit_bytes=20000",
    "--engine",
    "tokenizers",
]


def write_units(work: Path) -> None:
    """A corpus of a few hundred units: long enough to be killed in the middle."""
    megatrons_form(work)
    source = random.Random(0)
    with (work / "many.jsonl").open("w") as stream:
        for number in range(6000):
            stream.write(
                json.dumps(
                    {
                        "text": (
                            f"document {number} "
                            + " ".join(str(source.random()) for _ in range(30))
                        )
                    }
                )
                + "\n"
            )


def wait_for(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        assert process.poll() is None, "the build ended before it could be killed"
        time.sleep(0.002)


def killed_at_random(work: Path, kills: int) -> None:
    """Builds that are killed at a random moment and started again; each output must be as if
    undisturbed.
    """
    write_units(work)
    started = time.monotonic()
    assert run(work, *UNITS[:-5], "data/clean", *UNITS[-4:]).returncode == 0
    longest = time.monotonic() - started
    clean = {path.name: path.read_bytes() for path in (work / "data" / "clean").iterdir()}
    source, number = random.Random(1), 0
    while number < kills:
        shutil.rmtree(work / "data" / "many", ignore_errors=True)
        command = [sys.executable, str(TOOL), *UNITS, "--workers", str(1 + number % 2)]
        with subprocess.Popen(
            command,
            cwd=work,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        ) as process:
            # From the first import to the last rename; a build that was faster than the kill does
            # not count.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(source.uniform(0.2, longest))
            if process.poll() is not None:
                continue
            if number % 3:
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()  # alone every third time: then its workers must end by themselves
        assert run(work, *UNITS, "--workers", "1").returncode == 0
        assert {
            path.name: path.read_bytes() for path in (work / "data" / "many").iterdir()
        } == clean
        number += 1


def test_builds_killed_at_random_moments_end_as_if_undisturbed(work: Path) -> None:
    killed_at_random(work, 3)


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_a_hundred_builds_killed_at_random_moments_end_as_if_undisturbed(work: Path) -> None:
    killed_at_random(work, 100)
