"""Evaluation and generation with a model that drops tokens say that their results depend on the
batch.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pretrain.checkpoint.layout import TOKENIZER
from pretrain.checkpoint.weights_only import write_weights_folder
from pretrain.config.load import apply_override, validate_recipe
from pretrain.core.errors import DONE
from pretrain.evaluation.heldout.heldout import score_checkpoint
from pretrain.evaluation.heldout.scores import HeldoutScore
from pretrain.evaluation.report import markdown
from pretrain.model.decoder import DecoderLM
from pretrain.model.init import initialize
from tests.support.tiny_checkpoint import Trained
from tests.support.tool_runs import run_here

SAID = "the model drops tokens (model.moe.drop_tokens=true)"


@pytest.fixture(scope="module")
def dropping(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    content = trained.recipe.model_dump(mode="json")
    moe = (
        "{kind: deepspeed, gate: router, num_experts: 4, top_k: 2, moe_intermediate_size: 32,"
        " eval_capacity_factor: 0.5}"
    )
    for override in (f"model.moe={moe}", "model.initializer_range=0.3"):
        apply_override(content, override)
    recipe = validate_recipe(content, "a test's recipe")
    model = DecoderLM(recipe.model)
    initialize(model, seed=1)
    folder = tmp_path_factory.mktemp("dropping") / "weights"
    tensors = ((name, parameter.detach()) for name, parameter in model.named_parameters())
    write_weights_folder(folder, recipe, tensors, trained.checkpoint / TOKENIZER)
    return folder


def score(checkpoint: Path, trained: Trained, batch_size: int) -> HeldoutScore:
    return score_checkpoint(
        checkpoint,
        trained.data,
        "validation",
        torch.device("cpu"),
        batch_size=batch_size,
        max_windows=8,
        baselines=(),
    )


def test_a_held_out_loss_that_depends_on_the_batch_says_so(
    trained: Trained, dropping: Path
) -> None:
    alone, together = (score(dropping, trained, batch_size) for batch_size in (1, 8))
    assert abs(alone.loss - together.loss) > 1e-4
    assert [found.batch_size for found in (alone, together)] == [1, 8]
    assert SAID in str(together.depends_on_batch)
    report = markdown({"checkpoint": str(dropping), **together.to_dict()})
    assert f"Results depend on the batch: {SAID}" in report and "computed 8 at once" in report


def test_one_that_does_not_says_nothing(trained: Trained) -> None:
    alone, together = (score(trained.checkpoint, trained, batch_size) for batch_size in (1, 8))
    assert alone.loss == pytest.approx(together.loss, abs=1e-6)
    assert together.depends_on_batch is None
    assert "Results depend" not in markdown({"checkpoint": "", **together.to_dict()})


def test_generation_says_it_once(trained: Trained, dropping: Path) -> None:
    options = ("--prompt", "1 +", "--prompt", "2 +", "--max-new-tokens", "4")
    said = run_here("generate.py", "--model", dropping, *options)
    assert said.returncode == DONE and said.stderr.count(SAID) == 1
    assert SAID not in run_here("generate.py", "--model", trained.checkpoint, *options).stderr
