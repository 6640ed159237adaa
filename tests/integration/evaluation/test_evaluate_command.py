from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.config import DataConfig
from data_pipeline.loading.batch import Batch, to_batch
from data_pipeline.preprocess.coordinator import build
from data_pipeline.preprocess.workspace import Output
from data_pipeline.shards.datasets import load_datasets
from data_pipeline.shards.token_stream import open_split
from data_pipeline.sources.config import TextSource
from data_pipeline.tokenizer.config import TokenizerFile
from pretrain.checkpoint.layout import read_recipe, read_state
from pretrain.checkpoint.weights import load_state_dict
from pretrain.checkpoint.weights_only import write_weights_folder
from pretrain.config.timeline import Timeline
from pretrain.core.errors import BAD_CHECKPOINT, BAD_DATA, DONE, USAGE, ConfigError, DataError
from pretrain.evaluation.device import choose_device
from pretrain.evaluation.generation.generators import open_transformers
from pretrain.evaluation.heldout.heldout import (
    fit_on_seen_samples,
    score_checkpoint,
    score_transformers,
)
from pretrain.evaluation.heldout.ngram import fit_ngram
from pretrain.evaluation.heldout.perplexity import native_logits, score_batches, transformers_logits
from pretrain.evaluation.heldout.text import SlidingWindows, read_split
from tests.support.tiny_checkpoint import STEPS, Trained, make_data, seal
from tests.support.tool_runs import Done, run_here

CPU = torch.device("cpu")


def evaluate(*arguments: str | Path) -> Done:
    return run_here("evaluate.py", *arguments)


def test_every_target_of_the_split_is_scored_once_and_compared_with_the_bigram(
    trained: Trained,
) -> None:
    done = evaluate("--checkpoint", trained.latest, "--json", "-")
    assert done.returncode == DONE, done.stderr
    result = json.loads(done.stdout)
    tokens = open_split(trained.manifest, "validation").read(
        0, trained.manifest.splits["validation"].tokens
    )
    length, nats = trained.recipe.train.sequence_length, 0.0
    for start in range(0, len(tokens) - 1, length):
        window_S = torch.from_numpy(tokens[start : start + length + 1])
        with torch.inference_mode():
            log_probs_SV = trained.model.logits(window_S[None, :-1])[0].double().log_softmax(dim=1)
        nats -= float(log_probs_SV.gather(1, window_S[1:, None]).sum())
    assert result["targets"] == len(tokens) - 1 and result["step"] == STEPS
    assert result["loss"] == pytest.approx(nats / result["targets"], rel=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    assert result["bits_per_byte"] == pytest.approx(
        nats / math.log(2) / trained.manifest.splits["validation"].utf8_bytes, rel=1e-6
    )
    stream = open_split(trained.manifest, "train")
    seen = stream.read(0, (stream.num_tokens - 1) // length * length + 1)
    bigram = fit_ngram([(seen[:-1, None], seen[1:])], trained.manifest.tokenizer.vocab_size, 2)
    assert result["bigram"]["loss"] == pytest.approx(
        bigram.nll(tokens[:-1, None], tokens[1:]) / result["targets"], rel=1e-9
    )
    assert result["better_than_bigram_by"] == pytest.approx(
        result["bigram"]["loss"] - result["loss"]
    )
    assert result["better_than_bigram_by"] > 0.3


def test_the_bigram_reads_only_windows_that_the_model_has_seen(trained: Trained) -> None:
    length, datasets, state = (
        trained.recipe.train.sequence_length,
        load_datasets({"": str(trained.data)}),
        read_state(trained.checkpoint),
    )

    def samples(taken: int) -> dict[str, Any]:
        return {"data": state["data"] | {"samples": taken}}

    early, windows = fit_on_seen_samples(datasets, trained.recipe, state | samples(5))
    assert windows == 5 and early.levels[1].counts.sum() == 5 * length
    late, windows = fit_on_seen_samples(datasets, trained.recipe, state | samples(10**6))
    assert (
        windows == (trained.manifest.splits["train"].tokens - 1) // length
        and late.levels[1].counts.sum() == windows * length
    )
    with pytest.raises(DataError, match="seen no window"):
        fit_on_seen_samples(datasets, trained.recipe, state | samples(0))


def test_windows_can_be_fewer_and_batches_larger(trained: Trained) -> None:
    few = score_checkpoint(
        trained.checkpoint, trained.data, "validation", CPU, batch_size=7, max_windows=10
    )
    assert few.targets == 10 * trained.recipe.train.sequence_length and few.bits_per_byte is None
    whole = score_checkpoint(trained.checkpoint, trained.data, "validation", CPU, baselines=())
    larger = score_checkpoint(
        trained.checkpoint, trained.data, "validation", CPU, batch_size=11, baselines=()
    )
    assert (
        larger.loss == pytest.approx(whole.loss, rel=1e-6)
        and whole.bigram is None
        and whole.better_by is None
    )


def test_the_table_names_every_number(trained: Trained) -> None:
    done = run_here(
        "evaluate.py",
        "--checkpoint",
        trained.latest,
        "--max-windows",
        "4",
        "--split",
        "train",
        "--baselines",
        "unigram",
        "bigram",
    )
    assert done.returncode == DONE, done.stderr
    for name in (
        "targets",
        "loss",
        "perplexity",
        "accuracy",
        "bits per byte",
        "better than bigram by",
        "unigram",
        "bigram",
        "128 to 511",
    ):
        assert f"\n| {name} |" in done.stdout, name
    assert "train windows" in done.stderr


def test_data_of_another_tokenizer_is_refused(trained: Trained, tmp_path: Path) -> None:
    make_data(
        tmp_path / "other",
        {"a.txt": "quite another text\n" * 50, "b.txt": "and one more\n" * 50},
        vocab_size=260,
    )
    refused = evaluate("--checkpoint", trained.latest, "--data", tmp_path / "other")
    assert (
        refused.returncode == BAD_DATA
        and "another tokenizer" in refused.stderr
        and "Traceback" not in refused.stderr
    )


def test_other_text_of_the_same_tokenizer_can_be_scored_without_a_bigram(
    trained: Trained, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"1{name} + 2 = 3\n" * 40)
    tokenizer = TokenizerFile(kind="file", path=str(trained.data / "tokenizer.json"))
    build(
        DataConfig(
            source=TextSource(kind="text", input=[f"{tmp_path}/*.txt"]), tokenizer=tokenizer
        ),
        Output(tmp_path / "other"),
    )
    with pytest.raises(DataError, match="--no-bigram"):
        score_checkpoint(trained.checkpoint, tmp_path / "other", "validation", CPU)
    assert np.isfinite(
        score_checkpoint(
            trained.checkpoint, tmp_path / "other", "validation", CPU, baselines=()
        ).loss
    )


def test_a_device_that_is_not_there_is_refused() -> None:
    assert choose_device("cpu") == CPU and choose_device("auto").type in ("cpu", "cuda")
    for name in ("abacus", "cuda:99"):
        with pytest.raises(ConfigError, match=f"--device {name}"):
            choose_device(name)


def test_wrong_arguments_end_in_one_sentence_and_their_code(
    trained: Trained, tmp_path: Path
) -> None:
    cases = [
        (("--checkpoint", trained.latest, "--max-windows", "0"), USAGE, "--max-windows is 0"),
        (("--checkpoint", tmp_path / "step_7"), BAD_CHECKPOINT, "step_7"),
    ]
    for arguments, code, words in cases:
        refused = evaluate(*arguments)
        assert (
            refused.returncode == code
            and words in refused.stderr
            and "Traceback" not in refused.stderr
        ), refused.stderr


def test_a_stride_below_the_window_counts_every_target_once_with_more_context(
    trained: Trained,
) -> None:
    whole, sliding = (
        score_checkpoint(
            trained.checkpoint,
            trained.data,
            "validation",
            CPU,
            batch_size=16,
            baselines=(),
            window=32,
            stride=stride,
        )
        for stride in (32, 8)
    )
    assert sliding.targets == whole.targets == trained.manifest.splits["validation"].tokens - 1
    assert (sliding.window, sliding.stride, whole.stride) == (32, 8, 32)
    assert abs(sliding.loss - whole.loss) > 1e-3 and sliding.bits_per_byte is not None
    tokens = torch.from_numpy(open_split(trained.manifest, "validation").read(0, 97))
    with torch.inference_mode():
        log_probs_SV = trained.model.logits(tokens[None, 8:40])[0].double().log_softmax(dim=1)
        first_SV = trained.model.logits(tokens[None, :32])[0].double().log_softmax(dim=1)
    by_hand = -float(
        first_SV.gather(1, tokens[1:33, None]).sum()
        + log_probs_SV[24:].gather(1, tokens[33:41, None]).sum()
    )
    few = score_checkpoint(
        *(trained.checkpoint, trained.data, "validation", CPU),
        batch_size=2,
        max_windows=10**6,
        baselines=(),
        window=32,
        stride=8,
    )
    assert few.loss == pytest.approx(sliding.loss, rel=1e-6) and by_hand / 40 == pytest.approx(
        _first_targets(trained, 2), rel=1e-5
    )
    refused = evaluate("--checkpoint", trained.latest, "--window", "300", "--no-bigram")
    assert (
        refused.returncode == USAGE
        and "--window is 300 tokens, the model has 256 positions" in refused.stderr
    )


def _first_targets(trained: Trained, windows: int) -> float:
    """The loss over the targets of the first sliding windows, 32 tokens 8 apart."""
    text = read_split(load_datasets({"": str(trained.data)}), "validation")
    batch = to_batch(
        [SlidingWindows(text.stream, 32, 8, 0).read(number) for number in range(windows)]
    )
    ((nats_BS, _),) = score_batches(native_logits(trained.model), [batch], CPU)
    return float(nats_BS.sum()) / int((batch.labels_BS >= 0).sum())


def test_sources_and_lengths_add_up_to_the_whole(trained: Trained) -> None:
    score = score_checkpoint(
        trained.checkpoint,
        trained.data,
        "validation",
        CPU,
        batch_size=8,
        baselines=("unigram", "bigram", "4-gram"),
    )
    for groups in (score.by_source, score.by_length):
        assert sum(group.targets for group in groups.values()) == score.targets
        assert sum(group.targets * group.loss for group in groups.values()) == pytest.approx(
            score.targets * score.loss
        )
        assert sum(group.targets * group.accuracy for group in groups.values()) == pytest.approx(
            score.targets * score.accuracy
        )
    (text,) = score.by_source.values()
    assert text.bits_per_byte == pytest.approx(score.bits_per_byte) and 0.2 < score.accuracy < 1
    assert len({round(baseline.loss, 6) for baseline in score.baselines.values()}) == 3
    assert score.bigram is score.baselines["bigram"] and score.bigram.bits_per_byte is not None


def test_an_export_has_the_checkpoint_s_numbers_and_may_be_its_baseline(
    trained: Trained, exported: Path, tmp_path: Path
) -> None:
    length = str(trained.recipe.train.sequence_length)
    options = (
        "--data",
        trained.data,
        "--window",
        length,
        "--markdown",
        tmp_path / "report.md",
        "--tensorboard",
        tmp_path / "tb",
    )
    theirs = evaluate("--checkpoint", exported, *options, "--json", "-")
    assert theirs.returncode == DONE, theirs.stderr
    result = json.loads(theirs.stdout)
    ours = score_checkpoint(
        trained.checkpoint, trained.data, "validation", CPU, baselines=(str(exported),)
    )
    assert result["targets"] == ours.targets and result["step"] is None and result["bigram"] is None
    for name in ("loss", "accuracy", "bits_per_byte"):
        assert result[name] == pytest.approx(getattr(ours, name), rel=1e-5)
    assert ours.baselines[str(exported)].bits_per_byte == pytest.approx(
        ours.bits_per_byte, rel=1e-5
    )
    assert "| loss |" in (tmp_path / "report.md").read_text() and any(
        (tmp_path / "tb").glob("events.out.tfevents.*")
    )
    for arguments, words in (
        ((), "give held-out text with --data"),
        (("--data", trained.data, "--baselines", "bigram"), "leave it out"),
    ):
        refused = evaluate("--checkpoint", exported, *arguments)
        assert refused.returncode == USAGE and words in refused.stderr


def test_a_few_windows_of_an_export_are_those_of_its_checkpoint(
    trained: Trained, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the data's tokenizer, so nothing is decoded and encoded again."""
    ours = score_checkpoint(
        trained.checkpoint, trained.data, "validation", CPU, max_windows=5, baselines=()
    )
    monkeypatch.setattr(
        "pretrain.evaluation.generation.generators.TransformersGenerator.encode", None
    )
    theirs = score_transformers(
        exported,
        trained.data,
        "validation",
        CPU,
        max_windows=5,
        window=trained.recipe.train.sequence_length,
    )
    assert (
        theirs.targets == ours.targets == 5 * trained.recipe.train.sequence_length
        and theirs.bits_per_byte is None
    )
    assert (
        theirs.loss == pytest.approx(ours.loss, rel=1e-5)
        and theirs.by_length.keys() == ours.by_length.keys()
    )


def test_document_masks_hold_for_an_export_too(trained: Trained, exported: Path) -> None:
    documents_BS = (torch.arange(40) >= 17).long()[None].expand(2, -1)
    tokens_BS = torch.randint(
        trained.manifest.tokenizer.vocab_size, (2, 41), generator=torch.Generator().manual_seed(0)
    )
    batch = Batch(tokens_BS[:, :-1], tokens_BS[:, 1:], documents_BS)
    theirs = transformers_logits(open_transformers(exported, CPU).model)
    with torch.inference_mode():
        ours = native_logits(trained.model)(batch)
        torch.testing.assert_close(theirs(batch), ours, rtol=1e-4, atol=1e-4)
        assert (theirs(Batch(batch.input_ids_BS, batch.labels_BS)) - ours).abs().max() > 0.1


def test_prompts_references_and_code_are_in_one_report(trained: Trained, tmp_path: Path) -> None:
    rows = [{"prompt": f"{first} + 3 =", "reference": f" {first + 3}"} for first in range(5)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = [
        {"task_id": f"T/{n}", "prompt": "x = 0 #", "test": test}
        for n, test in enumerate(("assert x == 0", "assert x == 1", "while True: pass"))
    ]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    code = (
        "--code-problems",
        tmp_path / "problems.jsonl",
        "--num-samples",
        "2",
        "--pass-at",
        "1,2",
        "--temperature",
        "1",
        "--stop",
        "\\n",
    )
    texts = (
        "--prompt",
        "11 + 2 =",
        "--references",
        tmp_path / "pairs.jsonl",
        "--max-new-tokens",
        "6",
    )
    refused = evaluate("--checkpoint", trained.latest, *texts, *code)
    assert refused.returncode == USAGE and "allow it with --allow-code-execution" in refused.stderr
    done = evaluate(
        "--checkpoint",
        trained.latest,
        *texts,
        *code,
        "--allow-code-execution",
        "--program-seconds",
        "2",
        "--json",
        tmp_path / "r.json",
    )
    assert done.returncode == DONE, done.stderr
    result = json.loads((tmp_path / "r.json").read_text())
    assert (
        result["code"]["passed"] == {"T/0": 2, "T/1": 0, "T/2": 0}
        and result["code"]["timed_out"] == 2
    )
    assert result["code"]["pass_at"] == {"1": pytest.approx(1 / 3), "2": pytest.approx(1 / 3)}
    assert (
        result["texts"][0]["prompt"] == "11 + 2 ="
        and result["references"]["texts"] == 5
        and "loss" not in result
    )
    for words in ("| pass@1 | 0.3333 |", "## Against references", "| 11 + 2 = |"):
        assert words in done.stdout


def test_a_run_is_watched_until_its_last_step(trained: Trained, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.checkpoint.parent, run / "checkpoints")
    last = run / "checkpoints" / f"step_{STEPS}"
    for step in (10, 15, 20):
        earlier = shutil.copytree(last, run / "checkpoints" / f"step_{step}")
        (earlier / "state.json").write_text(json.dumps(read_state(last) | {"step": step}))
        seal(earlier)
    steps = Timeline(trained.recipe).num_steps
    os.rename(last, run / "checkpoints" / f"step_{steps}")
    watched = (
        "--watch",
        run,
        "--interval-steps",
        "10",
        "--max-windows",
        "4",
        "--heldout",
        "--prompt",
        "11 +",
        "--max-new-tokens",
        "4",
    )
    done = evaluate(*watched, "--json", "-")
    assert done.returncode == DONE, done.stderr
    rows = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == sorted({10, 20, steps}) and json.loads(done.stdout)[
        "evaluated"
    ] == len(rows)
    assert all(
        row["loss"] == pytest.approx(rows[0]["loss"]) and row["texts"][0]["prompt"] == "11 +"
        for row in rows
    )
    assert any((run / "tensorboard" / "evaluation").glob("events.out.tfevents.*"))
    (run / "evaluations.jsonl").write_text(json.dumps(rows[-1]) + '\n{"torn": ')
    again = evaluate(*watched, "--json", "-")
    assert json.loads(again.stdout)["evaluated"] == len(rows) - 1
    gone = evaluate("--watch", tmp_path / "none")
    assert gone.returncode == BAD_CHECKPOINT and "there is no run" in gone.stderr


def test_weights_alone_are_scored_without_an_n_gram(trained: Trained, tmp_path: Path) -> None:
    recipe, weights = read_recipe(trained.checkpoint), load_state_dict(trained.checkpoint)
    elsewhere = recipe.model_copy(
        update={"data": recipe.data.model_copy(update={"path": str(tmp_path / "nowhere")})}
    )
    write_weights_folder(
        tmp_path / "alone", elsewhere, weights.items(), trained.data / "tokenizer.json"
    )
    done = evaluate(
        "--checkpoint",
        tmp_path / "alone",
        "--data",
        trained.data,
        "--max-windows",
        "4",
        "--json",
        "-",
    )
    assert done.returncode == DONE and json.loads(done.stdout)["bigram"] is None, done.stderr
    refusals = {
        "or give other shards": (),
        "weights alone": ("--data", trained.data, "--baselines", "bigram"),
    }
    for words, options in refusals.items():
        refused = evaluate("--checkpoint", tmp_path / "alone", *options)
        assert refused.returncode == BAD_DATA and words in refused.stderr
