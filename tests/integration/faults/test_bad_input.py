"""Whatever is wrong with the input: one sentence that says what and where, the documented exit
code, no traceback.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from deepspeed.accelerator import get_accelerator

from pretrain.checkpoint import layout
from pretrain.config.load import load_recipe
from pretrain.core.errors import ConfigError
from pretrain.engine.precision import resolve_precision
from pretrain.run.folder import start_over
from tests.support.paths import LAUNCHERS, ROOT
from tests.support.tiny_run import Started, Tiny

Command = Callable[[list[str]], tuple[int, str]]
# The native layer renormalises with top_k 2 and drops nothing here, so that only the tested fault
# is one.
NATIVE = (
    "model.moe={kind: deepspeed, num_experts: 4, top_k: 2, moe_intermediate_size: 16, drop_tokens:"
    " false}"
)


def assert_one_sentence(message: str, *parts: str) -> None:
    # mpirun waits for its other ranks, and each says the same.
    errors = list({line for line in message.splitlines() if line.startswith("error: ")})
    assert len(errors) == 1, message
    assert "Traceback" not in message
    for part in parts:
        assert part in errors[0]


@pytest.mark.parametrize(
    ("overrides", "code", "parts"),
    [
        (["trian.precision=fp32"], 2, ("'trian'", "did you mean 'train'?")),
        (["model.moe.num_expert=4"], 2, ("'model.moe.num_expert'", "did you mean 'num_experts'")),
        (["model.hidden_size=wide"], 2, ("'model.hidden_size'", "'wide'")),
        (
            ["parallel.ep_size=3"],
            2,
            ("parallel.ep_size (3) does not divide model.moe.num_experts (4)",),
        ),
        (
            ["parallel.ep_size=2"],
            2,
            (
                "parallel.ep_size (2) does not divide the number of ranks (1)",
                "--set parallel.ep_size=1",
            ),
        ),
        (
            ["train.micro_batch_size=3"],
            2,
            ("train.global_batch_size (8)", "train.micro_batch_size (3)"),
        ),
        (["schedule.warmup_steps=9"], 2, ("schedule.warmup_steps (9)", "(5 steps)")),
        (["data.path=nowhere"], 3, ("there is no data in nowhere", "tools/preprocess_data.py")),
        (["model.vocab_size=100"], 3, ("model.vocab_size is 100", "300 entries")),
        (
            ["train.global_batch_size=4096", "train.train_tokens=10000000"],
            3,
            ("the training split has", "a step over 1 ranks needs 4096"),
        ),
    ],
)
def test_a_wrong_recipe_is_refused_with_one_sentence(
    overrides: list[str],
    code: int,
    parts: tuple[str, ...],
    tiny: Tiny,
    tmp_path: Path,
    train: Command,
) -> None:
    found, message = train(tiny.arguments(tmp_path / "run", *overrides))
    assert found == code
    assert_one_sentence(message, *parts)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_an_unknown_recipe_is_refused_and_the_nearest_one_named(train: Command) -> None:
    code, message = train(["--recipe", "quikstart"])
    assert code == 2
    assert_one_sentence(message, "there is no recipe 'quikstart'", "did you mean 'quickstart'?")


def test_native_experts_are_refused_with_zero_3(tiny: Tiny, tmp_path: Path, train: Command) -> None:
    code, message = train(tiny.arguments(tmp_path / "run", NATIVE, zero=3))
    assert code == 2
    assert_one_sentence(
        message, "model.moe.kind=deepspeed cannot run with ZeRO stage 3", "ds_configs/zero2.json"
    )


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (None, ("cannot read the ds_config",)),
        ("{not json", ("is not valid JSON",)),
        ("[1]", ("must hold a JSON object",)),
        (json.dumps({"zero_optimization": {"stage": 7}}), ("'zero_optimization.stage' is 7",)),
        (
            json.dumps({"train_batch_size": 64}),
            ("'train_batch_size' is 64", "train.global_batch_size says 8", '"auto"'),
        ),
        (
            json.dumps({"bf16": {"enabled": True}}),
            ("'bf16.enabled' is True", "train.precision says False"),
        ),
        (
            json.dumps({"optimizer": {"type": "Adam"}}),
            ("'optimizer' is owned by the recipe's 'optimizer'",),
        ),
    ],
)
def test_an_unreadable_or_clashing_ds_config_is_refused(
    content: str | None, parts: tuple[str, ...], tiny: Tiny, tmp_path: Path, train: Command
) -> None:
    path = tmp_path / "ds.json"
    if content is not None:
        path.write_text(content)
    code, message = train([*tiny.arguments(tmp_path / "run"), "--ds_config", str(path)])
    assert code == 2
    assert_one_sentence(message, str(path), *parts)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def swap_tokenizer(path: Path) -> None:
    content = json.loads(path.read_text())
    content["model"]["merges"] = content["model"]["merges"][::-1]
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("file", "break_file", "parts"),
    [
        ("train.bin", Path.unlink, ("train.bin cannot be read", "tools/preprocess_data.py")),
        ("train.bin", cut, ("train.bin has", "its manifest says")),
        ("validation.idx", cut, ("validation.idx has", "its manifest says")),
        (
            "tokenizer.json",
            swap_tokenizer,
            ("tokenizer.json differs from its manifest", "wrong tokenizer for the shards"),
        ),
        ("manifest.json", cut, ("manifest.json is not JSON",)),
    ],
)
def test_damaged_data_is_refused_with_the_name_of_the_file(
    file: str,
    break_file: Callable[[Path], None],
    parts: tuple[str, ...],
    tiny: Tiny,
    tmp_path: Path,
    train: Command,
) -> None:
    shutil.copytree(tiny.data, tmp_path / "data")
    break_file(tmp_path / "data" / file)
    code, message = train(tiny.arguments(tmp_path / "run", f"data.path={tmp_path / 'data'}"))
    assert code == 3
    assert_one_sentence(message, *parts)


@pytest.mark.parametrize(
    ("overrides", "zero", "parts"),
    [
        (["seed=8"], 1, ("another seed (7 -> 8)",)),
        (["model.moe.top_k=1"], 1, ("another model (moe.top_k: 2 -> 1)",)),
        (
            ["train.global_batch_size=16"],
            1,
            ("another train.global_batch_size (8 -> 16)",),
        ),
    ],
)
def test_a_run_is_not_resumed_as_another_one(
    overrides: list[str],
    zero: int,
    parts: tuple[str, ...],
    six_steps: Path,
    tiny: Tiny,
    train: Command,
) -> None:
    code, message = train(tiny.arguments(six_steps, *overrides, steps=9, zero=zero))
    assert code == 2
    assert_one_sentence(message, f"{six_steps} holds a run with", "--fresh --overwrite", *parts)


def test_a_run_folder_that_cannot_be_written_ends_with_code_5(
    tiny: Tiny, tmp_path: Path, train: Command
) -> None:
    (tmp_path / "file").write_text("in the way")
    code, message = train(tiny.arguments(tmp_path / "file" / "run"))
    assert code == 5
    assert_one_sentence(message, str(tmp_path / "file" / "run"), "--set run_path=FOLDER")


@pytest.mark.parametrize(
    ("command", "code", "parts"),
    [
        (
            [LAUNCHERS / "run_mpi.sh", "--recipe", "debug", "--set", "train.micro_batch=1"],
            2,
            ("'train.micro_batch'", "did you mean 'micro_batch_size'"),
        ),
        (
            [sys.executable, ROOT / "tools" / "evaluate.py", "--checkpoint", "manifest.json"],
            4,
            ("manifest.json is no checkpoint",),
        ),
    ],
)
def test_commands_as_processes_end_with_one_sentence_and_a_code(
    command: list[str | Path], code: int, parts: tuple[str, ...], tiny: Tiny
) -> None:
    started = Started(command, tiny.data)
    assert started.wait() == code
    assert_one_sentence(started.stderr, *parts)
    assert started.survivors() == []


def test_fp16_where_the_device_cannot_is_refused_with_what_to_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
    with pytest.raises(
        ConfigError,
        match=(
            r"train.precision is fp16, but this \w+ device cannot compute in it: use --set"
            r" train.precision=bf16 or fp32"
        ),
    ):
        resolve_precision("fp16")


@pytest.mark.parametrize("field", ["initial_weights", "branch_from"])
def test_starting_over_never_deletes_what_it_starts_from(
    field: str, six_steps: Path, tiny: Tiny, tmp_path: Path, train: Command
) -> None:
    run = Path(shutil.copytree(six_steps, tmp_path / "run"))
    (run / "initial_weights.json").write_text("{}")
    start = f"{field}={run / 'checkpoints' / 'latest'}"
    code, message = train([*tiny.arguments(run, start), "--fresh", "--overwrite"])
    assert code == 2
    assert_one_sentence(message, "would delete", f"which {field} starts from", "run_path")
    assert layout.damage(run / "checkpoints" / "step_6") is None
    start_over(run, True, load_recipe(str(tiny.recipe)))
    assert list(run.iterdir()) == []
