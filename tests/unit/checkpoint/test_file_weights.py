"""Single files of weights, as other training loops save them, under this project's names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pretrain.checkpoint.comparison import compare
from pretrain.checkpoint.foreign_state_dict import FileWeights
from pretrain.checkpoint.initialize_from import stored_readers
from pretrain.core.errors import CheckpointError
from pretrain.engine.placement import place_weights
from pretrain.model.decoder import DecoderLM
from pretrain.model.deferred import without_values
from tests.support.tiny_model import KINDS, tiny_config, tiny_model

MODEL = tiny_model(KINDS["dropless"], seed=5)
STATE = {name: tensor.clone() for name, tensor in MODEL.state_dict().items()}
CONFIG = MODEL.config


def saved(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def listed(state: dict[str, Tensor], numbered: bool) -> dict[str, Tensor]:
    """Stacked experts taken apart, the last one first."""
    names = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        stem, _, matrix = name.rpartition(".")
        if not stem.endswith(".experts"):
            found[name] = tensor
            continue
        for expert in reversed(range(len(tensor))):
            found[
                f"{stem}.{matrix}.{expert}"
                if numbered
                else f"{stem}.{expert}.{names[matrix]}.weight"
            ] = tensor[expert].clone()
    return found


def renamed(prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in STATE.items()}


FORMS: dict[str, Any] = {
    "as it is": STATE,
    "DistributedDataParallel": renamed("module."),
    "compiled": renamed("_orig_mod."),
    "compiled and distributed": renamed("_orig_mod.module."),
    "distributed, compiled, distributed": renamed("module._orig_mod.module."),
    "compiled blocks": {
        name.replace("layers.0.", "layers.0._orig_mod."): tensor for name, tensor in STATE.items()
    },
    "model_state_dict": {
        "model_state_dict": renamed("module."),
        "optimizer_state_dict": {"state": {0: torch.ones(2)}},
        "epoch": 3,
    },
    "model": {"model": STATE, "step": 100, "args": {"lr": 0.1}},
    "one inside the other": {"state_dict": {"model": STATE}},
    "numbered experts": listed(STATE, numbered=True),
    "a list of experts": {"model": listed(STATE, numbered=False)},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", ["new.pt", "old.pth"])
def test_every_form_of_a_state_dict_gives_the_same_weights(
    form: str, suffix: str, tmp_path: Path
) -> None:
    path = saved(
        tmp_path / suffix, FORMS[form], _use_new_zipfile_serialization=suffix.startswith("new")
    )
    stored = FileWeights(path, CONFIG)
    assert compare(stored.shapes, CONFIG).is_whole
    assert dict(stored).keys() == STATE.keys()
    for name, tensor in STATE.items():
        assert torch.equal(stored[name], tensor), name


@pytest.mark.parametrize("half", [False, True])
def test_safetensors_are_read_too_and_fill_a_model(half: bool, tmp_path: Path) -> None:
    state = {
        name: tensor.bfloat16() if half else tensor for name, tensor in renamed("module.").items()
    }
    save_file(state, tmp_path / "weights.safetensors")
    stored = FileWeights(tmp_path / "weights.safetensors", CONFIG)
    with without_values():
        model = DecoderLM(CONFIG, ep_size=2, ep_rank=1)
    readers = stored_readers(model, stored, 1, 2, STATE.keys())
    place_weights(model, 0, readers, torch.float32, torch.device("cpu"), None)
    for name, tensor in model.state_dict().items():
        whole = STATE[name].bfloat16().float() if half else STATE[name]
        assert torch.equal(tensor, whole[2:] if ".experts." in name else whole), name


@pytest.mark.parametrize("form", ["as it is", "numbered experts", "a list of experts"])
def test_a_range_of_a_tensor_is_read_alone(form: str, tmp_path: Path) -> None:
    stored = FileWeights(saved(tmp_path / "new.pt", FORMS[form]), CONFIG)
    for name, tensor in STATE.items():
        size = tensor.numel()
        for first, last in ((0, size), (size // 3, size - size // 4), (size - 1, size)):
            found = stored.read_range(name, first, last)
            assert torch.equal(found, tensor.view(-1)[first:last]), name


def test_experts_outside_of_the_range_are_not_read(tmp_path: Path) -> None:
    stored = FileWeights(saved(tmp_path / "new.pt", FORMS["numbered experts"]), CONFIG)
    name = next(name for name in STATE if name.endswith("experts.w1"))
    read: list[int] = []
    stored._readers[name] = [
        lambda expert=expert, reader=reader: (read.append(expert), reader())[1]
        for expert, reader in enumerate(stored._readers[name])
    ]
    size = STATE[name][0].numel()
    stored.read_range(name, size + 1, 2 * size + 1)
    assert read == [1, 2]


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("new", [True, False])
def test_a_pickle_that_runs_code_is_refused_and_runs_none(new: bool, tmp_path: Path) -> None:
    path = saved(
        tmp_path / "evil.pt",
        {"model": STATE, "config": Payload(tmp_path / "ran")},
        _use_new_zipfile_serialization=new,
    )
    with pytest.raises(CheckpointError, match="cannot be read without running code that it holds"):
        FileWeights(path, CONFIG)
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists()  # the payload is one


@pytest.mark.parametrize(
    "content,sentence",
    [
        ([STATE], "holds no tensors by name"),
        ({"epoch": 3}, "neither at its top nor under model_state_dict"),
        (
            {**STATE, "module.final_norm.weight": torch.ones(32)},
            r"'final_norm\.weight' twice, once as 'module\.final_norm\.weight'",
        ),
        (
            {"model.embed_tokens.weight": torch.ones(2, 2)},
            r"Hugging Face model: convert its folder with tools/convert_checkpoint\.py --from hf",
        ),
        (
            {name: t for name, t in listed(STATE, True).items() if not name.endswith("w2.1")},
            r"experts \[0, 2, 3\] of 'layers\.0.*w2', not all",
        ),
    ],
)
def test_what_is_no_state_of_a_model_is_refused(
    content: Any, sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        FileWeights(saved(tmp_path / "file.pt", content), CONFIG)


def test_a_missing_and_a_cut_off_file_are_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no file"):
        FileWeights(tmp_path / "nothing.pt", CONFIG)
    path = saved(tmp_path / "cut.pt", STATE)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match=r"cut\.pt cannot be read"):
        FileWeights(path, CONFIG)


def test_a_tied_heads_copy_is_left_out_and_another_head_is_not(tmp_path: Path) -> None:
    tied = tiny_config("model.tie_word_embeddings=true")
    state = {**STATE, "head.weight": STATE["embedding.weight"]}
    assert "head.weight" not in FileWeights(saved(tmp_path / "tied.pt", state), tied)
    assert "head.weight" in FileWeights(saved(tmp_path / "untied.pt", STATE), tied)


def test_what_does_not_fit_is_listed_by_kind() -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in STATE.items()}
    shapes |= {"extra": (3,), "final_norm.weight": (7,)}
    del shapes["head.weight"]
    found = compare(shapes, CONFIG)
    assert (found.missing, found.unexpected, found.wrong_shapes) == (
        ["head.weight"],
        ["extra"],
        [("final_norm.weight", (7,), (32,))],
    )
    assert not found.is_whole and len(found.loaded) == len(STATE) - 2
    assert found.counts == f"1 missing, 1 unexpected, 1 of another shape, {len(STATE) - 2} that fit"
    assert [row[:2] for row in found.rows()] == [
        ("head.weight", "missing"),
        ("final_norm.weight", "of another shape"),
        ("extra", "unexpected"),
    ]
