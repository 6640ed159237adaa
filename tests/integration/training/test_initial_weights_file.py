"""A run that starts from a file of weights: from all of it, from the part that fits and says so, or
not at all.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pretrain.checkpoint.initialize_from import REPORT
from pretrain.checkpoint.weights import load_state_dict
from pretrain.core.errors import CheckpointError
from pretrain.model.decoder import DecoderLM
from pretrain.model.init import initialize
from pretrain.train import main
from tests.support.tiny_run import Tiny, make_trainer, own_process

SLOWLY = ("optimizer.learning_rate=1e-30",)  # what is saved is what it started from


@pytest.fixture(scope="module")
def state(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    with own_process():
        config = make_trainer(tiny, tmp_path_factory.mktemp("sizes"), zero=0).engine.recipe.model
    model = DecoderLM(config)
    initialize(model, seed=99)
    return {f"_orig_mod.module.{name}": tensor for name, tensor in model.state_dict().items()}


def saved(run: Path) -> dict[str, torch.Tensor]:
    return load_state_dict(run / "checkpoints" / "step_2")


def test_a_run_starts_from_the_file_alone(
    tiny: Tiny, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    torch.save({"model_state_dict": state}, tmp_path / "weights.pt")
    with own_process():
        assert (
            main(
                tiny.arguments(
                    tmp_path / "run", *SLOWLY, f"initial_weights={tmp_path / 'weights.pt'}", steps=2
                )
            )
            == 0
        )
    for name, tensor in saved(tmp_path / "run").items():
        assert torch.equal(tensor, state[f"_orig_mod.module.{name}"]), name
    assert not (tmp_path / "run" / REPORT).exists()


def test_a_part_is_refused_unless_it_is_asked_for_and_then_told(
    tiny: Tiny, state: dict[str, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = {name: tensor for name, tensor in state.items() if "layers.1." not in name} | {
        "extra": torch.ones(2)
    }
    part["_orig_mod.module.final_norm.weight"] = torch.ones(5)
    torch.save(part, tmp_path / "part.pt")
    setting = (*SLOWLY, f"initial_weights={tmp_path / 'part.pt'}")
    with own_process():
        with pytest.raises(
            CheckpointError,
            match=(
                r"no tensor 'layers\.1\..*\(\d+ missing, 1 unexpected, 1 of another"
                r" shape.*initial_weights_partial"
            ),
        ):
            main(tiny.arguments(tmp_path / "run", *setting, steps=2))
        assert (
            main(
                tiny.arguments(tmp_path / "run", *setting, "initial_weights_partial=true", steps=2)
            )
            == 0
        )
        assert main(tiny.arguments(tmp_path / "random", *SLOWLY, steps=2)) == 0
    report, said = json.loads((tmp_path / "run" / REPORT).read_text()), capsys.readouterr().err
    assert report["unexpected"] == ["extra"] and report["wrong_shapes"] == [
        ["final_norm.weight", [5], [32]]
    ]
    assert "fits in part: " in said and "extra" in said and "layers.1." in said
    random = saved(tmp_path / "random")
    assert set(report["loaded"]) | set(report["missing"]) | {"final_norm.weight"} == random.keys()
    for name, tensor in saved(tmp_path / "run").items():
        expected = state[f"_orig_mod.module.{name}"] if name in report["loaded"] else random[name]
        assert torch.equal(tensor, expected), name


def test_a_file_of_another_model_is_refused_even_in_part(tiny: Tiny, tmp_path: Path) -> None:
    torch.save({"something.weight": torch.ones(2)}, tmp_path / "other.pt")
    setting = (f"initial_weights={tmp_path / 'other.pt'}", "initial_weights_partial=true")
    with own_process(), pytest.raises(CheckpointError, match="0 that fit"):
        main(tiny.arguments(tmp_path / "run", *setting, steps=2))


def test_a_hugging_face_folder_is_sent_to_the_converter(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    with (
        own_process(),
        pytest.raises(CheckpointError, match=r"tools/convert_checkpoint\.py --from hf"),
    ):
        main(tiny.arguments(tmp_path / "run", f"initial_weights={tmp_path / 'hf'}", steps=2))
