"""``transformers serve`` returns from OpenAI's /v1/completions the text that our model takes
greedily.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from data_pipeline.tokenizer.tokenizer import Tokenizer
from pretrain.engine.topology import free_port
from pretrain.export.hf_folder import write_hf_folder
from pretrain.export.targets import choose_target
from pretrain.model.decoder import DecoderLM
from tests.support.custom_exports import weights_of
from tests.support.in_memory_tensors import InMemoryTensors
from tests.support.package_environment import environment_with
from tests.support.random_checkpoint import random_model, recipe_of, small_tokenizer

# What transformers[serving] adds to this project's requirements and to what they bring along.
PACKAGES = ("fastapi", "uvicorn", "openai>=1.98", "jiter")
PROMPT, NEW_TOKENS = "def f(x)", 12
STARTED_S = 120


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which ``transformers serve`` has its packages."""
    return environment_with(PACKAGES, tmp_path_factory.mktemp("site"), "--no-deps")


@contextmanager
def server(model: Path, environment: dict[str, str]) -> Iterator[str]:
    """The address of a server of the folder ``model``; the server ends with the block."""
    port, log = free_port(), model.parent / "server.log"
    command = [
        str(Path(sys.executable).with_name("transformers")),
        "serve",
        str(model),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + STARTED_S
        while "Uvicorn running" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=30)


def completion(address: str, **fields: object) -> str:
    body = json.dumps({"prompt": PROMPT, "max_tokens": NEW_TOKENS, **fields}).encode()
    request = urllib.request.Request(
        f"{address}/v1/completions", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return str(json.load(answer)["choices"][0]["text"])


def greedy_text(model: DecoderLM, tokenizer: Tokenizer) -> str:
    ids: list[int] = tokenizer.encode([PROMPT])[0].tolist()
    prompt_tokens = len(ids)
    with torch.inference_mode():
        for _ in range(NEW_TOKENS):
            ids.append(int(model.logits(torch.tensor([ids]))[0, -1].argmax()))
    assert tokenizer.eod_id not in ids
    return tokenizer.decode(ids[prompt_tokens:])


@pytest.mark.full
def test_a_server_of_an_export_answers_with_the_greedy_text(
    serving: dict[str, str], tmp_path: Path
) -> None:
    recipe, tokenizer = recipe_of("debug"), small_tokenizer()
    model, other = random_model(recipe), random_model(recipe, seed=1)
    folder = tmp_path / "export"
    folder.mkdir()
    write_hf_folder(
        folder, choose_target(recipe), recipe.model, InMemoryTensors(weights_of(model)), tokenizer
    )
    with server(folder, serving) as address:
        greedy = completion(address, model=str(folder), temperature=0)
        sampled = completion(
            address, generation_config=json.dumps({"do_sample": True, "temperature": 5.0}), seed=1
        )
    assert greedy == greedy_text(model, tokenizer) != greedy_text(other, tokenizer)
    assert sampled != greedy
