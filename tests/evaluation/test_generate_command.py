from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data_pipeline.token_stream import open_split
from pretrain.config.errors import BAD_CHECKPOINT, DONE, USAGE
from pretrain.evaluation.generation import Sampling, generate
from pretrain.evaluation.generators import NativeGenerator, open_generator
from pretrain.export.convert import export_hf
from tests.export.tiny_checkpoint import Trained

TOOL = Path(__file__).resolve().parents[2] / "tools" / "generate.py"


def run_tool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), *map(str, arguments)], capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="session")
def exported(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("export") / "hf"
    export_hf(trained.checkpoint, output, open_split(trained.manifest, "validation"), torch.float32, overwrite=False)
    return output


def test_a_checkpoint_and_its_export_write_the_same_text(trained: Trained, exported: Path) -> None:
    ours, theirs = (open_generator(path, torch.device("cpu")) for path in (trained.checkpoint, exported))
    prompt = "11 + 2 = 13\n11 +"
    assert ours.encode(prompt) == theirs.encode(prompt) and ours.eod_id == theirs.eod_id
    for sampling in (Sampling(greedy=True), Sampling(top_p=0.9, top_k=50, seed=5)):
        texts = [
            generator.decode(generate(generator.start(60), generator.encode(prompt), sampling, generator.eod_id, range(40)))
            for generator in (ours, theirs)
        ]
        assert texts[0] == texts[1] and len(texts[0]) > 20


def test_the_command_opens_an_export(exported: Path) -> None:
    done = run_tool("--model", exported, "--prompt", "11 + 2 =", "--max-new-tokens", "5", "--json", "-", "--seed", "1")
    assert done.returncode == DONE, done.stderr
    result = json.loads(done.stdout)
    assert 1 <= result["new_tokens"] <= 5 and result["tokens_per_second"] > 0


def test_text_goes_to_standard_output_and_progress_does_not(trained: Trained) -> None:
    done = run_tool("--model", trained.latest, "--prompt", "11 + 2 =", "--greedy", "--max-new-tokens", "8")
    assert done.stdout.startswith("11 + 2 =") and "generating" not in done.stdout and "generating" in done.stderr


def test_an_empty_prompt_starts_a_new_document(trained: Trained) -> None:
    done = run_tool("--model", trained.latest, "--prompt", "", "--greedy", "--max-new-tokens", "12", "--json", "-")
    assert done.returncode == DONE and "+" in json.loads(done.stdout)["text"]


def test_a_prompt_that_spells_the_end_of_document_is_only_text(trained: Trained) -> None:
    generator = open_generator(trained.checkpoint, torch.device("cpu"))
    assert isinstance(generator, NativeGenerator)
    ids = generator.encode("a<|endoftext|>b ü\n")
    assert generator.eod_id not in ids and generator.decode(ids) == "a<|endoftext|>b ü\n"


def test_wrong_arguments_end_in_one_sentence_and_their_code(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    cases = [
        (("--model", trained.latest, "--max-new-tokens", "300"), USAGE, "256 positions"),
        (("--model", tmp_path), BAD_CHECKPOINT, "transformers cannot open"),
    ]
    for arguments, code, words in cases:
        refused = run_tool("--prompt", "x", *arguments)
        assert refused.returncode == code and words in refused.stderr and "Traceback" not in refused.stderr, refused.stderr
