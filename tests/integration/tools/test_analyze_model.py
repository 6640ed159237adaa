"""tools/analyze_model.py: what it says of a recipe, on the terminal, as JSON and as a picture."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pretrain.config.load import load_recipe
from pretrain.core.errors import DONE, ConfigError, StorageError
from pretrain.model.sizes import COMPONENTS
from tests.support.fork_server import run_python
from tests.support.paths import TOOLS
from tools.analyze_model import analyze, cost_rows, main, memory_by_layout, model_size, sized_model

TOOL = TOOLS / "analyze_model.py"


def run(*arguments: str | Path, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    return run_python(TOOL, *arguments, cwd=folder)


def analyzed(name: str, *overrides: str, world_size: int = 1) -> dict[str, Any]:
    return analyze(load_recipe(name, list(overrides)), world_size)


def test_json_alone_on_standard_output_and_a_picture(tmp_path: Path) -> None:
    """Neither data nor tokenizer are there, and nothing is left behind but the picture."""
    done = run(
        "--recipe",
        "p828_60m",
        "--world-size",
        "4",
        "--plot",
        "sizes.png",
        "--json",
        "-",
        folder=tmp_path,
    )
    assert done.returncode == DONE, done.stderr
    result = json.loads(done.stdout)
    assert result == analyzed("p828_60m", world_size=4)
    assert result["parameters_total"] == 60_889_356 and result["parameters_active"] == 56_950_028
    assert result["kinds"]["model.attention"] == "gqa"
    assert result["kinds"]["optimizer"] == "adamw" and "model.moe.router" in result["kinds"]
    assert result["recipe"] == "p828_60m" and result["parameters_padding"] == 0
    assert sum(result["components"].values()) == result["parameters_total"] and set(
        result["components"]
    ) == set(COMPONENTS)
    assert [path.name for path in tmp_path.iterdir()] == ["sizes.png"]
    assert (tmp_path / "sizes.png").read_bytes().startswith(b"\x89PNG")


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """The command inside this process: starting another one takes seconds."""
    monkeypatch.setattr(sys, "argv", ["analyze_model.py", *arguments])
    main()


def test_tables_show_components_costs_and_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command(
        monkeypatch,
        "--recipe",
        "debug",
        "--world-size",
        "2",
        "--set",
        "model.moe.num_shared_experts=1",
    )
    shown = capsys.readouterr().out
    for part in (
        "debug: parameters",
        "shared experts",
        "routed experts",
        "FLOPs a token",
        "cache",
        "ZeRO",
        "ep_size 1",
        "ep_size 2",
    ):
        assert part in shown
    assert f"{analyzed('debug', 'model.moe.num_shared_experts=1')['parameters_total']:,}" in shown
    assert "positions" not in shown  # a component without parameters has no row


@pytest.mark.parametrize(
    "arguments,error,part",
    [
        (["--recipe", "h64m"], ConfigError, "did you mean 'h64lm'"),
        (
            ["--recipe", "debug", "--world-size", "0"],
            ConfigError,
            "--world-size 0 is no number of ranks",
        ),
        (
            ["--recipe", "debug", "--plot", "/proc/none/sizes.png"],
            StorageError,
            "choose another --plot path",
        ),
    ],
)
def test_what_cannot_be_done_is_told(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], error: type[Exception], part: str
) -> None:
    with pytest.raises(error, match=part):
        command(monkeypatch, *arguments)


def test_a_vocabulary_without_a_size_is_told() -> None:
    with pytest.raises(
        ConfigError,
        match=r"olmoe_1b_7b: the vocabulary's size is missing.*--set model\.vocab_size=N",
    ):
        analyzed("olmoe_1b_7b", "model.vocab_size=null")
    assert (
        sized_model(load_recipe("quickstart")).vocab_size == 4096
    )  # the size of the tokenizer that its data section trains


def test_memory_is_given_for_every_stage_and_every_way_to_share_experts() -> None:
    memory = analyzed("olmoe_1b_7b", world_size=12)["memory"]
    assert list(memory) == ["0", "1", "2", "3"]
    assert all(
        list(layouts) == ["1", "2", "4"] for layouts in memory.values()
    )  # divisors of 12 ranks and of 64 experts
    totals = {
        (stage, ep): layouts[ep]["total"] for stage, layouts in memory.items() for ep in layouts
    }
    assert (
        totals["0", "4"] < totals["0", "1"]
        and totals["3", "4"] < totals["1", "4"] < totals["0", "4"]
    )
    native = ("model.moe.kind=deepspeed", "model.moe.gate=router", "model.moe.drop_tokens=false")
    assert list(analyzed("olmoe_1b_7b", *native)["memory"]) == [
        "0",
        "1",
        "2",
    ]  # DeepSpeed's layer has no stage 3
    recipe = load_recipe(
        "debug",
        [
            "model.layer_pattern.kind=all_dense",
            "model.intermediate_size=48",
            "model.vocab_size=512",
        ],
    )
    assert list(
        memory_by_layout(model_size(recipe.model, 64), recipe.model, "bf16", 4, recipe.optimizer)[
            "1"
        ]
    ) == ["1"]


def test_the_cache_counts_windows_and_shared_heads() -> None:
    result = analyzed("gpt_oss_20b")
    of_a_layer = 2 * 8 * 64 * 2  # keys and values of 8 heads of 64 numbers, two bytes each
    assert result["kv_cache_bytes_per_token"] == 24 * of_a_layer
    assert result["kv_cache_bytes_full_context"] == 12 * (131072 + 128) * of_a_layer
    assert (
        analyzed("h64lm")["kv_cache_bytes_per_token"] * 3
        == analyzed("h64lm", "model.attention.num_key_value_heads=12")["kv_cache_bytes_per_token"]
    )


def test_the_whole_run_is_tokens_times_flops() -> None:
    result = analyzed("h64lm")
    assert result["train_tokens"] == 7975 * 128 * 1024
    assert result["train_flops"] == result["flops_per_token"] * result["train_tokens"]
    assert result["active_share"] == pytest.approx(122_318_592 / 249_720_576)


def test_the_whole_run_of_epochs_is_unknown_before_there_are_data() -> None:
    result = analyzed("h64lm_phase1")
    assert result["train_tokens"] is None and result["train_flops"] is None
    assert "not known before there are data" in cost_rows(result)["whole run"]
