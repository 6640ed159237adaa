from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data_pipeline.loader import open_split
from pretrain.config.errors import BAD_CHECKPOINT, DONE, USAGE
from pretrain.evaluation.generators import NativeGenerator, open_generator
from pretrain.export.convert import export_hf
from tests.export.tiny_checkpoint import Trained

TOOL = Path(__file__).resolve().parents[2] / "tools" / "generate.py"


def generate(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), *map(str, arguments)], capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="session")
def exported(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("export") / "hf"
    export_hf(trained.checkpoint, output, open_split(trained.data, trained.manifest, "validation"), torch.float32, overwrite=False)
    return output


def test_a_checkpoint_and_its_export_write_the_same_text(trained: Trained, exported: Path) -> None:
    for how in (["--greedy"], ["--seed", "5", "--top-p", "0.9", "--top-k", "50"]):
        texts = []
        for model in (trained.latest, exported):
            done = generate("--model", model, "--prompt", "11 + 2 =", "--max-new-tokens", "40", "--json", "-", *how)
            assert done.returncode == DONE, done.stderr
            texts.append(json.loads(done.stdout)["text"])
        assert texts[0] == texts[1] and len(texts[0]) > 20


def test_text_goes_to_standard_output_and_progress_does_not(trained: Trained) -> None:
    done = generate("--model", trained.latest, "--prompt", "11 + 2 =", "--greedy", "--max-new-tokens", "8")
    assert done.stdout.startswith("11 + 2 =") and "generating" not in done.stdout and "generating" in done.stderr


def test_an_empty_prompt_starts_a_new_document(trained: Trained) -> None:
    done = generate("--model", trained.latest, "--prompt", "", "--greedy", "--max-new-tokens", "12", "--json", "-")
    assert done.returncode == DONE and "+" in json.loads(done.stdout)["text"]


def test_a_prompt_that_spells_the_end_of_document_is_only_text(trained: Trained) -> None:
    generator = open_generator(trained.checkpoint, torch.device("cpu"))
    assert isinstance(generator, NativeGenerator)
    ids = generator.encode("a<|endoftext|>b ü\n")
    assert generator.eod_id not in ids and generator.decode(ids) == "a<|endoftext|>b ü\n"


def test_wrong_arguments_end_in_one_sentence_and_their_code(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    cases = [
        (("--model", trained.latest, "--max-new-tokens", "0"), USAGE, "--max-new-tokens is 0"),
        (("--model", trained.latest, "--max-new-tokens", "300"), USAGE, "256 positions"),
        (("--model", trained.latest, "--temperature", "0"), USAGE, "greedy"),
        (("--model", tmp_path / "step_7"), BAD_CHECKPOINT, "step_7"),
        (("--model", tmp_path), BAD_CHECKPOINT, "transformers cannot open"),
    ]
    for arguments, code, words in cases:
        refused = generate("--prompt", "x", *arguments)
        assert refused.returncode == code and words in refused.stderr and "Traceback" not in refused.stderr, refused.stderr
