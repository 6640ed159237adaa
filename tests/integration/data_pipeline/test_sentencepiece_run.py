"""A SentencePiece model all the way: trained on the corpus, used by several workers, in runs of two
ranks, streams, checkpoints, generation, evaluation and an export of transformers.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import sentencepiece

from data_pipeline.preprocess.coordinator import build
from data_pipeline.preprocess.workspace import Output
from data_pipeline.shards.manifest import Manifest, load_manifest, verify
from data_pipeline.shards.split import SPLITS
from data_pipeline.shards.token_stream import open_split
from data_pipeline.tokenizer.config import TrainBPE
from data_pipeline.tokenizer.training import train_bpe
from pretrain.config.load import load_recipe
from pretrain.core.errors import ConfigError
from tests.support.tiny_run import RECIPE, WORDS, Tiny, start_ranks
from tests.support.tool_runs import run_here

TOKENIZER = (
    "{kind: train_sentencepiece, vocab_size: 200, normalization: nmt_nfkc, byte_fallback: false,"
    " reserved_tokens: [<pre>, <mid>, <suf>], user_defined_symbols: [<user>]}"
)
MIDDLE = "data.fill_in_the_middle={prefix_token: <pre>, middle_token: <mid>, suffix_token: <suf>}"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "texts").mkdir()
    for number in range(30):
        words = WORDS[number % 7 :] * 30
        text = " ".join(words).replace("token", "<user>\uff76\uff9e") + f" {number} ½"
        (folder / "texts" / f"{number}.txt").write_text(text)
    recipe = folder / "recipe.yaml"
    content = RECIPE.replace("DATA", str(folder / "data")).replace("TEXTS", str(folder / "texts"))
    recipe.write_text(content.replace("{kind: train_bpe, vocab_size: 300}", TOKENIZER))
    (folder / "zero1.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    build(load_recipe(str(recipe)).data, Output(folder / "data"), workers=2)
    return Tiny(folder, recipe, folder / "data")


@pytest.fixture(scope="module")
def checkpoint(project: Tiny) -> Path:
    """Two ranks train three steps, and two more in a second start."""
    run = project.folder / "run"
    for steps in (3, 5):
        ranks = start_ranks(project.arguments(run, steps=steps), project.folder)
        assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].stderr
    return run / "checkpoints" / "step_5"


def library(manifest: Manifest) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(manifest.tokenizer_path))


def test_workers_write_the_ids_of_the_library_and_two_builds_are_equal(project: Tiny) -> None:
    manifest = load_manifest(project.data)
    assert manifest.tokenizer.file == "tokenizer.model"
    assert manifest.created_by.startswith("tools/preprocess_data.py with sentencepiece")
    verify(manifest, deep=True)
    original = library(manifest)
    expected = {
        (*original.encode(path.read_text()), original.eos_id())
        for path in (project.folder / "texts").iterdir()
    }
    stream = open_split(manifest, "validation")
    starts = [*stream.document_starts(0, stream.num_tokens).tolist(), stream.num_tokens]
    found = {tuple(stream.read(start, end - start).tolist()) for start, end in pairwise(starts)}
    assert found and found < expected
    build(load_recipe(str(project.recipe)).data, Output(project.folder / "again"), workers=1)
    again = load_manifest(project.folder / "again")
    assert again.fingerprint == manifest.fingerprint
    names = ["tokenizer.model", *(f"{split}.bin" for split in SPLITS)]
    for name in names:
        assert (project.data / name).read_bytes() == (project.folder / "again" / name).read_bytes()


def test_documents_are_rearranged_by_a_model_that_keeps_their_blanks(project: Tiny) -> None:
    """Sentinels are tokens that no text spells; each part has the ids of the library."""
    folder = project.folder / "middle"
    with pytest.raises(ConfigError, match="adds a blank to each text"):
        build(load_recipe(str(project.recipe), [MIDDLE]).data, Output(folder), workers=1)
    fields = ("dummy_prefix=false", "normalization=identity", "byte_fallback=true")
    exact = [f"data.tokenizer.{field}" for field in (*fields, "vocab_size=500")]
    build(load_recipe(str(project.recipe), [MIDDLE, *exact]).data, Output(folder), workers=2)
    manifest = load_manifest(folder)
    original = library(manifest)
    sentinels = [original.piece_to_id(name) for name in ("<pre>", "<suf>", "<mid>")]
    train = open_split(manifest, "train")
    starts = [*train.document_starts(0, train.num_tokens).tolist(), train.num_tokens]
    texts = {path.read_text() for path in (project.folder / "texts").iterdir()}
    rearranged = 0
    for start, end in pairwise(starts):
        ids = train.read(start, end - start).tolist()[:-1]
        cuts = [place for place, number in enumerate(ids) if number in sentinels]
        if [ids[place] for place in cuts] != sentinels:
            continue
        bounds = [*cuts[1:], len(ids)]
        parts = [ids[begin + 1 : stop] for begin, stop in zip(cuts, bounds, strict=True)]
        prefix, suffix, middle = map(original.decode, parts)
        assert prefix + middle + suffix in texts
        rearranged += len(middle) > 0
    assert rearranged


def test_a_run_resumes_and_its_checkpoint_generates(project: Tiny, checkpoint: Path) -> None:
    model = (project.data / "tokenizer.model").read_bytes()
    assert (checkpoint / "tokenizer.model").read_bytes() == model
    assert not (checkpoint / "tokenizer.json").exists()
    done = run_here(
        "generate.py", "--model", checkpoint, "--prompt", "the router", "--max-new-tokens", "8"
    )
    assert done.returncode == 0 and "the router" in done.stdout, done.stderr
    done = run_here("inspect_data.py", project.data, "--sample", "1", "--split", "validation")
    assert done.returncode == 0 and "every expert" in done.stdout, done.stderr


def test_an_export_has_the_ids_in_a_class_of_transformers(
    project: Tiny, checkpoint: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    done = run_here(
        "convert_checkpoint.py", "--checkpoint", checkpoint, "--to", "hf", "--output",
        tmp_path / "hf", "--data", project.data,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    original = library(load_manifest(project.data))
    opened = AutoTokenizer.from_pretrained(tmp_path / "hf", local_files_only=True)
    for text in ("the router \uff76\uff9e ½ sends", "", "中文 <user>x  y", "\n\t a"):
        ids = opened(text, add_special_tokens=False)["input_ids"]
        assert ids == original.encode(text)
    losses = []
    for model in (checkpoint, tmp_path / "hf"):
        scores = tmp_path / "scores.json"
        done = run_here(
            "evaluate.py", "--checkpoint", model, "--data", project.data, "--json", scores,
            "--window", "32", "--no-bigram",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        losses.append(json.loads(scores.read_text())["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    done = run_here(
        "convert_checkpoint.py", "--checkpoint", checkpoint, "--to", "safetensors", "--output",
        tmp_path / "plain",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "plain" / "tokenizer.model").is_file()


def test_a_stream_is_encoded_by_the_library_in_training(project: Tiny) -> None:
    model = project.data / "tokenizer.model"
    data = project.folder / "streamed"
    settings = [
        "data.streaming=true",
        f"data.path={data}",
        f"data.tokenizer={{kind: sentencepiece, path: {model}}}",
        "data.streaming_validation_documents=5",
    ]
    overrides = [part for setting in settings for part in ("--set", setting)]
    done = run_here("preprocess_data.py", "--recipe", project.recipe, *overrides)
    assert done.returncode == 0, done.stderr
    assert (data / "tokenizer.model").read_bytes() == model.read_bytes()
    ranks = start_ranks(
        project.arguments(project.folder / "stream-run", *settings, steps=2), project.folder
    )
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].stderr


def test_a_run_without_any_special_token_trains_and_writes_after_a_prompt(project: Tiny) -> None:
    folder = project.folder / "plain"
    folder.mkdir()
    config = TrainBPE(vocab_size=300)
    content = json.loads(train_bpe([" ".join(WORDS)] * 3, config).content)
    vocabulary = {name: number - 1 for name, number in content["model"]["vocab"].items() if number}
    content["model"]["vocab"] = vocabulary
    (folder / "plain.json").write_text(json.dumps(content | {"added_tokens": []}))
    settings = [
        f"data.path={folder / 'data'}",
        f"data.tokenizer={{kind: file, path: {folder / 'plain.json'}, append_eod: false}}",
    ]
    overrides = [part for setting in settings for part in ("--set", setting)]
    done = run_here("preprocess_data.py", "--recipe", project.recipe, *overrides)
    assert done.returncode == 0 and "end of document is no token" in done.stdout, done.stderr
    run = folder / "run"
    [rank] = start_ranks(project.arguments(run, *settings, steps=2), project.folder, world_size=1)
    assert rank.wait() == 0, rank.stderr
    checkpoint = run / "checkpoints" / "step_2"
    generate = ("generate.py", "--model", checkpoint, "--max-new-tokens", "4", "--prompt")
    done = run_here(*generate, "the router")
    assert done.returncode == 0 and "the router" in done.stdout, done.stderr
    done = run_here(*generate, "")
    assert done.returncode == 2 and "no token that ends a document" in done.stderr
    done = run_here("evaluate.py", "--checkpoint", checkpoint, "--window", "32", "--no-bigram")
    assert done.returncode == 0, done.stderr
    done = run_here(
        "convert_checkpoint.py", "--checkpoint", checkpoint, "--to", "hf", "--output", folder / "hf"
    )
    assert done.returncode == 4 and "data.tokenizer.eod_token" in done.stderr
