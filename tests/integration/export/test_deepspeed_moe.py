from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pretrain.core.errors import DONE, CheckpointError, ConfigError
from pretrain.export.deepspeed_moe import import_deepspeed
from pretrain.export.writer import open_exported_weights
from tests.support.fork_server import run_python
from tests.support.paths import TOOLS

TOOL = TOOLS / "convert_checkpoint.py"
NATIVE = "block.{layer}.moe.deepspeed_moe.experts.deepspeed_experts.{expert}.fc.weight"
DENSE = {
    "embed.weight": torch.randn(5, 2).to(torch.bfloat16),
    "block.0.moe.deepspeed_moe.gate.wg.weight": torch.randn(3, 2),
}
EXPERTS = {(layer, expert): torch.randn(4, 2) for layer in range(2) for expert in range(3)}
MAIN = {"module": DENSE, "num_experts": [3, 3], "global_steps": 12, "optimizer": None}


def expert_file(layer: int | None, expert: int) -> str:
    return (
        "" if layer is None else f"layer_{layer}_"
    ) + f"expert_{expert}_mp_rank_00_model_states.pt"


def by_layer(folder: Path) -> None:
    for (layer, expert), tensor in EXPERTS.items():
        torch.save(
            {NATIVE.format(layer=layer, expert=expert): tensor}, folder / expert_file(layer, expert)
        )


def stacked_by_name(folder: Path) -> None:
    for (layer, expert), tensor in EXPERTS.items():
        torch.save(
            {f"block.{layer}.experts.w1.{expert}": tensor}, folder / expert_file(layer, expert)
        )


def all_layers_in_one(folder: Path) -> None:
    for expert in range(3):
        torch.save(
            {
                NATIVE.format(layer=layer, expert=expert): EXPERTS[layer, expert]
                for layer in range(2)
            },
            folder / expert_file(None, expert),
        )


LAYOUTS: dict[str, Callable[[Path], None]] = {
    "native": by_layer,
    "AutoEP": stacked_by_name,
    "before layers had numbers": all_layers_in_one,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tag = tmp_path / "run" / "global_step12"
    tag.mkdir(parents=True)
    torch.save(MAIN, tag / "mp_rank_00_model_states.pt")
    return tag


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_experts_are_read_and_keep_their_names(
    layout: str, folder: Path, tmp_path: Path
) -> None:
    LAYOUTS[layout](folder)
    conversion = import_deepspeed(folder, tmp_path / "out", torch.float32, overwrite=False)
    assert conversion.step == 12
    found = open_exported_weights(tmp_path / "out")
    expected = {name: tensor.float() for name, tensor in DENSE.items()}
    if layout == "AutoEP":
        expected |= {
            f"block.{layer}.experts.w1": torch.stack(
                [EXPERTS[layer, expert] for expert in range(3)]
            )
            for layer in range(2)
        }
    else:
        expected |= {
            NATIVE.format(layer=layer, expert=expert): tensor
            for (layer, expert), tensor in EXPERTS.items()
        }
    assert set(found.names) == expected.keys() and all(
        torch.equal(found.read(name), tensor) for name, tensor in expected.items()
    )


def test_the_command_follows_latest(folder: Path, tmp_path: Path) -> None:
    by_layer(folder)
    (folder.parent / "latest").write_text("global_step12")
    arguments = [
        "--from",
        "deepspeed",
        str(folder.parent),
        "--dtype",
        "bfloat16",
        "--output",
        str(tmp_path / "out"),
    ]
    done = run_python(TOOL, *arguments)
    assert done.returncode == DONE, done.stderr
    assert "wrote 8 tensors" in done.stdout


def stray(folder: Path) -> None:
    torch.save({"other": torch.zeros(1)}, folder / expert_file(1, 3))


def doubled(folder: Path) -> None:
    torch.save({NATIVE.format(layer=0, expert=0): EXPERTS[0, 0]}, folder / expert_file(1, 2))


def cut(folder: Path) -> None:
    path = folder / expert_file(0, 1)
    path.write_bytes(path.read_bytes()[:200])


class RunsCode:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch ran",)


def dangerous(folder: Path) -> None:
    torch.save({"a": torch.zeros(1), "b": RunsCode()}, folder / expert_file(0, 1))


@pytest.mark.parametrize(
    "change,words",
    [
        (lambda folder: (folder / expert_file(0, 1)).unlink(), "lacks expert 1 of MoE layer 0"),
        (lambda folder: (folder / expert_file(1, 2)).unlink(), "lacks expert 2 of MoE layer 1"),
        (
            stray,
            (
                "layer_1_expert_3_mp_rank_00_model_states.pt is of an expert that the checkpoint"
                " does not have"
            ),
        ),
        (
            doubled,
            "is both in layer_0_expert_0_mp_rank_00_model_states.pt and in layer_1_expert_2",
        ),
        (cut, "layer_0_expert_1_mp_rank_00_model_states.pt cannot be read"),
        (dangerous, "without running code"),
        (all_layers_in_one, "beside each other"),
        (
            lambda folder: (folder / "mp_rank_00_model_states.pt").unlink(),
            "has no mp_rank_00_model_states.pt",
        ),
    ],
)
def test_what_is_missing_stray_doubled_damaged_or_dangerous_is_named(
    change: Callable[[Path], object], words: str, folder: Path, tmp_path: Path
) -> None:
    by_layer(folder)
    change(folder)
    with pytest.raises(CheckpointError, match=words):
        import_deepspeed(folder, tmp_path / "out", torch.float32, overwrite=False)
    assert not (tmp_path / "out").exists() and not Path("ran").exists()


@pytest.mark.parametrize(
    "name,words",
    [
        ("zero_pp_rank_0_mp_rank_00_model_states.pt", "ZeRO stage 3"),
        ("mp_rank_01_model_states.pt", "tensor-parallel"),
        ("layer_0_expert_0_mp_rank_01_model_states.pt", "tensor-parallel share"),
    ],
)
def test_files_that_hold_no_whole_weights_are_refused(
    name: str, words: str, folder: Path, tmp_path: Path
) -> None:
    by_layer(folder)
    torch.save({}, folder / name)
    with pytest.raises(ConfigError, match=words):
        import_deepspeed(folder, tmp_path / "out", torch.float32, overwrite=False)
