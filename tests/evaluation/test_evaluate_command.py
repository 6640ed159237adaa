from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.build.coordinator import build
from data_pipeline.build.workspace import Output
from data_pipeline.corpora import load_corpora
from data_pipeline.token_stream import open_split
from pretrain.checkpoint.layout import read_state
from pretrain.config.data_schema import DataConfig, TextSource, TokenizerFile
from pretrain.config.errors import BAD_CHECKPOINT, BAD_DATA, DONE, USAGE, ConfigError, DataError
from pretrain.evaluation.bigram import fit_bigram
from pretrain.evaluation.device import choose_device
from pretrain.evaluation.heldout import fit_on_seen_samples, score_checkpoint
from tests.export.tiny_checkpoint import STEPS, Trained, make_data

TOOL = Path(__file__).resolve().parents[2] / "tools" / "evaluate.py"
CPU = torch.device("cpu")


def evaluate(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), *map(str, arguments)], capture_output=True, text=True, timeout=300)


def test_every_target_of_the_split_is_scored_once_and_compared_with_the_bigram(trained: Trained) -> None:
    done = evaluate("--checkpoint", trained.latest, "--json", "-")
    assert done.returncode == DONE, done.stderr
    result = json.loads(done.stdout)
    tokens = open_split(trained.manifest, "validation").read(0, trained.manifest.splits["validation"].tokens)
    length, nats = trained.recipe.train.sequence_length, 0.0
    for start in range(0, len(tokens) - 1, length):
        window_S = torch.from_numpy(tokens[start : start + length + 1])
        with torch.inference_mode():
            log_probs_SV = trained.model.logits(window_S[None, :-1])[0].double().log_softmax(dim=1)
        nats -= float(log_probs_SV.gather(1, window_S[1:, None]).sum())
    assert result["targets"] == len(tokens) - 1 and result["step"] == STEPS
    assert result["loss"] == pytest.approx(nats / result["targets"], rel=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / trained.manifest.splits["validation"].utf8_bytes, rel=1e-6)
    stream = open_split(trained.manifest, "train")
    seen = stream.read(0, (stream.num_tokens - 1) // length * length + 1)
    bigram = fit_bigram([(seen[:-1], seen[1:])], trained.manifest.tokenizer.vocab_size)
    assert result["bigram"]["loss"] == pytest.approx(bigram.nll(tokens[:-1], tokens[1:]) / result["targets"], rel=1e-9)
    assert result["better_than_bigram_by"] == pytest.approx(result["bigram"]["loss"] - result["loss"])
    assert result["better_than_bigram_by"] > 0.3


def test_the_bigram_reads_only_windows_that_the_model_has_seen(trained: Trained) -> None:
    length, corpora, state = trained.recipe.train.sequence_length, load_corpora({"": str(trained.data)}), read_state(trained.checkpoint)
    early, windows = fit_on_seen_samples(corpora, trained.recipe, state | {"consumed_tokens": 5 * length})
    assert windows == 5 and early.counts.sum() == 5 * length
    late, windows = fit_on_seen_samples(corpora, trained.recipe, state | {"consumed_tokens": 10**6 * length})
    assert windows == (trained.manifest.splits["train"].tokens - 1) // length and late.counts.sum() == windows * length
    with pytest.raises(DataError, match="seen no window"):
        fit_on_seen_samples(corpora, trained.recipe, state | {"consumed_tokens": 0})


def test_windows_can_be_fewer_and_batches_larger(trained: Trained) -> None:
    few = score_checkpoint(trained.checkpoint, trained.data, "validation", CPU, batch_size=7, max_windows=10)
    assert few.targets == 10 * trained.recipe.train.sequence_length and few.bits_per_byte is None
    whole = score_checkpoint(trained.checkpoint, trained.data, "validation", CPU, baselines=())
    larger = score_checkpoint(trained.checkpoint, trained.data, "validation", CPU, batch_size=11, baselines=())
    assert larger.loss == pytest.approx(whole.loss, rel=1e-6) and whole.bigram is None and whole.better_by is None


def test_the_table_names_every_number(trained: Trained) -> None:
    done = evaluate("--checkpoint", trained.latest, "--max-windows", "4", "--split", "train")
    assert done.returncode == DONE, done.stderr
    for name in ("targets", "loss", "perplexity", "bits per byte", "bigram loss", "better than bigram by"):
        assert f"\n{name} " in done.stdout
    assert "train windows" in done.stderr


def test_data_of_another_tokenizer_is_refused(trained: Trained, tmp_path: Path) -> None:
    make_data(tmp_path / "other", {"a.txt": "quite another text\n" * 50, "b.txt": "and one more\n" * 50}, vocab_size=260)
    refused = evaluate("--checkpoint", trained.latest, "--data", tmp_path / "other")
    assert refused.returncode == BAD_DATA and "another tokenizer" in refused.stderr and "Traceback" not in refused.stderr


def test_other_text_of_the_same_tokenizer_can_be_scored_without_a_bigram(trained: Trained, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"1{name} + 2 = 3\n" * 40)
    tokenizer = TokenizerFile(kind="file", path=str(trained.data / "tokenizer.json"))
    build(DataConfig(source=TextSource(kind="text", input=[f"{tmp_path}/*.txt"]), tokenizer=tokenizer), Output(tmp_path / "other"))
    with pytest.raises(DataError, match="--no-bigram"):
        score_checkpoint(trained.checkpoint, tmp_path / "other", "validation", CPU)
    assert np.isfinite(score_checkpoint(trained.checkpoint, tmp_path / "other", "validation", CPU, baselines=()).loss)


def test_a_device_that_is_not_there_is_refused() -> None:
    assert choose_device("cpu") == CPU and choose_device("auto").type in ("cpu", "cuda")
    for name in ("abacus", "cuda:99"):
        with pytest.raises(ConfigError, match=f"--device {name}"):
            choose_device(name)


def test_wrong_arguments_end_in_one_sentence_and_their_code(trained: Trained, tmp_path: Path) -> None:
    cases = [
        (("--checkpoint", trained.latest, "--max-windows", "0"), USAGE, "--max-windows is 0"),
        (("--checkpoint", tmp_path / "step_7"), BAD_CHECKPOINT, "step_7"),
    ]
    for arguments, code, words in cases:
        refused = evaluate(*arguments)
        assert refused.returncode == code and words in refused.stderr and "Traceback" not in refused.stderr, refused.stderr
