"""tools/inspect_checkpoint.py: what is inside a checkpoint, whether it is as it was saved, and in
what two differ.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.checkpoint.inspect import compare_checkpoints, inspect_checkpoint
from pretrain.checkpoint.weights import load_state_dict
from pretrain.core.errors import BAD_CHECKPOINT, DONE
from pretrain.core.files import file_sha256
from tests.support.checkpoint_variants import over_ranks, variant
from tests.support.fork_server import run_python
from tests.support.paths import TOOLS
from tests.support.tiny_checkpoint import STEPS, Trained, make_trained

TOOL = TOOLS / "inspect_checkpoint.py"
NAME = "layers.1.feed_forward.experts.w1"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return make_trained(tmp_path_factory.mktemp("trained"), ("model.moe.bias_balancing={}",))


def inspect(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return run_python(TOOL, *arguments)


def test_files_weights_and_experts_are_told(trained: Trained) -> None:
    result = inspect_checkpoint(trained.checkpoint, verify=True)
    state = load_state_dict(trained.checkpoint)
    assert result["step"] == STEPS and result["parameters"] == sum(
        tensor.numel() for tensor in state.values()
    )
    assert result["tensors"] == {name: list(tensor.shape) for name, tensor in state.items()}
    assert {file["name"]: file["sha256"] for file in result["files"]} == {
        path.name: file_sha256(path)
        for path in trained.checkpoint.iterdir()
        if path.name != "manifest.json"
    }
    assert all(file["fault"] is None for file in result["files"])
    layer = result["experts"][1]
    assert [row["layer"] for row in result["experts"]] == [0, 1] and layer["balance_bias"] == [
        0,
        0,
        0,
        0,
    ]
    for number in range(4):
        assert layer["norms"]["gate_proj.weight"][number] == pytest.approx(
            float(state[NAME][number].norm())
        )
        assert layer["norms"]["down_proj.weight"][number] == pytest.approx(
            float(state[NAME.replace("w1", "w2")][number].norm())
        )
        assert layer["router_norms"][number] == pytest.approx(
            float(state["layers.1.feed_forward.router.gate.weight"][number].norm())
        )
    flat = torch.cat([state[NAME.replace("w1", f"w{n}")].flatten(1) for n in (1, 2, 3)], dim=1)
    cosines = torch.nn.functional.cosine_similarity(flat[:, None], flat[None], dim=-1)
    off_diagonal = cosines[~torch.eye(4, dtype=torch.bool)]
    assert layer["most_alike"]["cosine"] == pytest.approx(float(off_diagonal.max()), abs=1e-6)
    assert layer["least_alike"]["cosine"] == pytest.approx(float(off_diagonal.min()), abs=1e-6)
    first, second = layer["most_alike"]["experts"]
    assert float(cosines[first, second]) == pytest.approx(float(off_diagonal.max()), abs=1e-6)


def test_a_changed_file_is_found_by_its_hash_alone(trained: Trained, tmp_path: Path) -> None:
    damaged = variant(trained, tmp_path / "damaged")
    content = bytearray((damaged / "weights-00000-of-00001.safetensors").read_bytes())
    content[-1] ^= 1
    (damaged / "weights-00000-of-00001.safetensors").write_bytes(content)
    assert all(file["fault"] is None for file in inspect_checkpoint(damaged)["files"])
    done = inspect("--checkpoint", damaged, "--verify", "--tensors", "--recipe")
    assert (
        done.returncode == BAD_CHECKPOINT
        and "weights-00000-of-00001.safetensors does not have the content that was saved"
        in done.stderr
    )
    assert (
        "Traceback" not in done.stderr
        and NAME in done.stdout
        and "num_hidden_layers: 2" in done.stdout
    )


def changed(tensors: dict[str, Any]) -> None:
    tensors[NAME] = tensors[NAME].clone()
    tensors[NAME][2, 0, 0] += 0.5
    tensors["head.weight"] = -tensors["head.weight"]
    tensors["final_norm.weight"] = tensors["final_norm.weight"] * 1.001


def test_differences_are_told_tensor_by_tensor_the_largest_first(
    trained: Trained, tmp_path: Path
) -> None:
    other = over_ranks(
        variant(trained, tmp_path / "other", changed, "model.moe.aux_loss_weight=0.5"), 2
    )
    result = compare_checkpoints(trained.checkpoint, other)
    before = load_state_dict(trained.checkpoint)
    head, experts, norm = result["tensors"][:3]
    assert [head["name"], experts["name"], norm["name"]] == [
        "head.weight",
        NAME,
        "final_norm.weight",
    ]
    assert head["absolute"] == pytest.approx(2 * float(before["head.weight"].abs().max())) and head[
        "cosine"
    ] == pytest.approx(-1)
    assert head["relative"] == pytest.approx(2)
    assert experts["absolute"] == pytest.approx(0.5, rel=1e-5) and 0.99 < experts["cosine"] < 1
    assert norm["relative"] == pytest.approx(0.001, rel=1e-2) and norm["cosine"] == pytest.approx(1)
    assert result["equal"] == len(before) - 3 and all(
        row["absolute"] == 0 for row in result["tensors"][3:]
    )
    assert result["recipe"] == {"model.moe.aux_loss_weight": [0.01, 0.5]}
    assert (
        compare_checkpoints(trained.checkpoint, other, "cosine")["tensors"][0]["name"]
        == "head.weight"
    )


def test_missing_tensors_and_other_shapes_come_first(trained: Trained, tmp_path: Path) -> None:
    def edit(tensors: dict[str, Any]) -> None:
        tensors |= {
            name: tensor[:3].clone()
            for name, tensor in tensors.items()
            if ".experts." in name or ".gate." in name
        }
        for name in [name for name in tensors if "balance_bias" in name]:
            del tensors[name]

    other = variant(
        trained,
        tmp_path / "other",
        edit,
        "model.moe.num_experts=3",
        "model.moe.bias_balancing=null",
    )
    done = inspect("--checkpoint", trained.latest, "--diff", other, "--json", "-")
    assert done.returncode == DONE, done.stderr
    rows = json.loads(done.stdout)["tensors"]
    faults = {row["name"]: row["fault"] for row in rows[:10]}
    assert (
        faults[NAME] == "[4, 32, 32] and [3, 32, 32]"
        and faults["layers.0.feed_forward.router.balance_bias"] == f"missing in {other}"
    )
    assert all(row["fault"] is None for row in rows[10:])
    shown = inspect("--checkpoint", trained.latest, "--diff", other, "--top", "3")
    assert (
        shown.returncode == DONE
        and NAME.replace("1", "0", 1) in shown.stdout
        and "model.moe.num_experts is 4 in a, 3 in b" in shown.stdout
    )
