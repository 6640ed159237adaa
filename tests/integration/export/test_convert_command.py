from __future__ import annotations

import io
import json
import runpy
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_pipeline.shards.token_stream import open_split
from pretrain.checkpoint import layout
from pretrain.checkpoint.weights import WEIGHTS, file_of, load_state_dict
from pretrain.config.load import recipe_to_yaml
from pretrain.core.errors import BAD_CHECKPOINT, BAD_DATA, DONE, USAGE, CheckpointError, run_command
from pretrain.export.convert import export_hf, export_safetensors
from pretrain.export.writer import open_exported_weights
from tests.support.fork_server import run_python
from tests.support.paths import TOOLS
from tests.support.random_checkpoint import random_checkpoint, recipe_of, small_tokenizer
from tests.support.tiny_checkpoint import STEPS, Trained, make_data, seal

OWN_NAMES = (
    "model.moe.kind=deepspeed",
    "model.moe.drop_tokens=false",
)  # each expert's matrices are tensors of their own
TOOL = TOOLS / "convert_checkpoint.py"

WEIGHTS_FILE = file_of(WEIGHTS, 0, 1)


def convert(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command inside this process: the imports of a new one take longer than what it does."""
    out, err = io.StringIO(), io.StringIO()
    main = runpy.run_path(str(TOOL))["main"]
    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(out),
        redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        patch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
        run_command(main)
    return subprocess.CompletedProcess(
        arguments, int(ended.value.code or 0), out.getvalue(), err.getvalue()
    )


def convert_in_a_process(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return run_python(TOOL, *arguments)


def changed_copy(trained: Trained, folder: Path, overrides: dict[str, object]) -> Path:
    """A whole checkpoint whose recipe's MoE section says something else."""
    checkpoint = folder / trained.checkpoint.name
    shutil.copytree(trained.checkpoint, checkpoint)
    model = trained.recipe.model
    assert model.moe is not None
    changed = trained.recipe.model_copy(
        update={"model": model.model_copy(update={"moe": model.moe.model_copy(update=overrides)})}
    )
    (checkpoint / layout.RECIPE).write_text(recipe_to_yaml(changed))
    seal(checkpoint)
    return checkpoint


@pytest.mark.parametrize(
    "dtype,options",
    [("float32", ()), ("bfloat16", ("--target", "qwen3_moe", "--max-shard-size", "50KB"))],
)
def test_the_hf_export_is_compared_published_and_opens_in_transformers(
    trained: Trained, tmp_path: Path, dtype: str, options: tuple[str, ...]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = convert if options else convert_in_a_process
    done = run(
        "--checkpoint",
        trained.latest,
        "--to",
        "hf",
        "--output",
        tmp_path / "out",
        "--dtype",
        dtype,
        "--json",
        "-",
        *options,
    )
    assert done.returncode == DONE, done.stderr
    result = json.loads(done.stdout)
    assert (
        result["parity"]["windows"] == 8
        and result["parity"]["max_difference"] <= 1e-4 < result["parity"]["logits_std"]
    )
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == (2 if options else 1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert (
        model.dtype == getattr(torch, dtype)
        and model.config.vocab_size == trained.manifest.tokenizer.vocab_size
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = tokenizer("11 + 2 =", return_tensors="pt").input_ids
    with torch.inference_mode():
        ours, theirs = trained.model.logits(prompt), model(prompt).logits.float()
    assert (ours - theirs).abs().max() < (1e-4 if dtype == "float32" else 0.3)
    assert tokenizer.decode(
        model.generate(prompt, max_new_tokens=8, do_sample=False)[0]
    ).startswith("11 + 2 =")


def test_plain_safetensors_hold_every_weight_bit_for_bit(trained: Trained, tmp_path: Path) -> None:
    done = convert(
        "--checkpoint", trained.checkpoint, "--to", "safetensors", "--output", tmp_path / "out"
    )
    assert done.returncode == DONE, done.stderr
    expected, written = load_state_dict(trained.checkpoint), open_exported_weights(tmp_path / "out")
    assert expected.keys() == set(written.names) and all(
        torch.equal(expected[name], written.read(name)) for name in expected
    )
    assert json.loads((tmp_path / "out" / "export.json").read_text())["step"] == STEPS
    assert (tmp_path / "out" / layout.RECIPE).read_text() == (
        trained.checkpoint / layout.RECIPE
    ).read_text()


def test_an_earlier_export_is_replaced_only_when_asked(trained: Trained, tmp_path: Path) -> None:
    export_safetensors(trained.checkpoint, tmp_path / "out", torch.float32, overwrite=False)
    arguments = (
        "--checkpoint",
        trained.checkpoint,
        "--to",
        "safetensors",
        "--output",
        tmp_path / "out",
    )
    refused = convert(*arguments, "--dtype", "bfloat16")
    assert (
        refused.returncode == USAGE
        and "--overwrite" in refused.stderr
        and "Traceback" not in refused.stderr
    )
    assert convert(*arguments, "--dtype", "bfloat16", "--overwrite").returncode == DONE
    written = open_exported_weights(tmp_path / "out")
    assert {written.form(name).dtype for name in written.names} == {torch.bfloat16}


def test_a_model_that_a_target_cannot_compute_is_refused_with_its_reasons(
    trained: Trained, tmp_path: Path
) -> None:
    checkpoint = changed_copy(trained, tmp_path, {"num_shared_experts": 1})
    refused = convert(
        "--checkpoint",
        checkpoint,
        "--to",
        "hf",
        "--target",
        "qwen3_moe",
        "--output",
        tmp_path / "out",
    )
    assert (
        refused.returncode == USAGE
        and "num_shared_experts is 1" in refused.stderr
        and "Traceback" not in refused.stderr
    )
    assert not (tmp_path / "out").exists()


def test_data_of_another_tokenizer_is_refused(trained: Trained, tmp_path: Path) -> None:
    make_data(
        tmp_path / "other",
        {"a.txt": "quite another text\n" * 50, "b.txt": "and one more\n" * 50},
        vocab_size=260,
    )
    refused = convert(
        "--checkpoint",
        trained.checkpoint,
        "--to",
        "hf",
        "--output",
        tmp_path / "out",
        "--data",
        tmp_path / "other",
    )
    assert (
        refused.returncode == BAD_DATA
        and "another tokenizer" in refused.stderr
        and "Traceback" not in refused.stderr
    )


def test_a_damaged_checkpoint_is_refused(trained: Trained, tmp_path: Path) -> None:
    checkpoint = tmp_path / trained.checkpoint.name
    shutil.copytree(trained.checkpoint, checkpoint)
    weights = bytearray((checkpoint / WEIGHTS_FILE).read_bytes())
    weights[-5] ^= 1
    (checkpoint / WEIGHTS_FILE).write_bytes(weights)
    refused = convert("--checkpoint", checkpoint, "--to", "hf", "--output", tmp_path / "out")
    assert (
        refused.returncode == BAD_CHECKPOINT
        and WEIGHTS_FILE in refused.stderr
        and "Traceback" not in refused.stderr
    )
    assert not (tmp_path / "out").exists()


def test_an_export_whose_logits_differ_is_not_published(trained: Trained, tmp_path: Path) -> None:
    """A weight that is not a number makes every logit differ from itself."""
    checkpoint = tmp_path / trained.checkpoint.name
    shutil.copytree(trained.checkpoint, checkpoint)
    weights = load_file(checkpoint / WEIGHTS_FILE)
    weights["layers.0.attention.q_proj.weight"][0, 0] = torch.inf
    save_file(weights, checkpoint / WEIGHTS_FILE)
    heldout = open_split(trained.manifest, "validation")
    with pytest.raises(CheckpointError, match="nothing was published"):
        export_hf(checkpoint, tmp_path / "out", heldout, torch.float32, overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.name]


@pytest.mark.parametrize(
    "arguments,words",
    [
        (("--from", "gguf", "x", "--output", "y"), "the formats are hf, deepspeed, megatron"),
        (("--from", "hf", "x", "--to", "hf", "--output", "y"), "--from decides what"),
        (("--checkpoint", "x", "--output", "y"), "--checkpoint goes with --to"),
        (
            ("--checkpoint", "x", "--to", "safetensors", "--target", "llama", "--output", "y"),
            "goes with --to hf only",
        ),
        (
            (
                "--checkpoint",
                "x",
                "--to",
                "safetensors",
                "--max-shard-size",
                "big",
                "--output",
                "y",
            ),
            "is no size",
        ),
    ],
)
def test_a_command_line_that_contradicts_itself_is_refused(
    arguments: tuple[str, ...], words: str
) -> None:
    refused = convert(*arguments)
    assert (
        refused.returncode == USAGE
        and words in refused.stderr
        and "Traceback" not in refused.stderr
    )


def test_without_memory_for_two_models_every_tensor_is_compared_and_it_says_so(
    trained: Trained, tmp_path: Path
) -> None:
    heldout = open_split(trained.manifest, "validation")
    size = 2 * 4 * sum(tensor.numel() for tensor in load_state_dict(trained.checkpoint).values())
    enough = export_hf(
        trained.checkpoint,
        tmp_path / "enough",
        heldout,
        torch.float32,
        overwrite=False,
        memory_bytes=size,
    )
    assert enough.parity is not None and enough.unchecked is None
    short = export_hf(
        trained.checkpoint,
        tmp_path / "short",
        heldout,
        torch.float32,
        overwrite=False,
        memory_bytes=size - 1,
    )
    assert short.parity is None and "bit for bit" in str(short.unchecked)
    assert (
        json.loads((tmp_path / "short" / "export.json").read_text())["unchecked"] == short.unchecked
    )


def large_checkpoint(folder: Path, experts: int) -> Path:
    """Random weights of one layer with many experts of 8 MB each."""
    sizes = [
        "model.hidden_size=1024",
        "model.moe.moe_intermediate_size=2048",
        f"model.moe.num_experts={experts}",
        "model.num_hidden_layers=1",
    ]
    random_checkpoint(folder, recipe_of("debug", *sizes, *OWN_NAMES), small_tokenizer())
    return folder


def test_a_killed_conversion_leaves_nothing_under_its_name_and_the_next_one_works(
    tmp_path: Path,
) -> None:
    checkpoint = large_checkpoint(tmp_path / "checkpoint", experts=8)
    output, partial = tmp_path / "out", tmp_path / ".out.partial"
    command = [
        sys.executable,
        str(TOOL),
        "--checkpoint",
        str(checkpoint),
        "--to",
        "safetensors",
        "--output",
        str(output),
    ]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while running.poll() is None and not any(partial.glob("*.safetensors")):
        time.sleep(0.005)
    running.kill()
    running.communicate()
    assert running.returncode == -signal.SIGKILL
    assert not output.exists() and any(partial.iterdir()), "it was killed while it wrote"
    export_safetensors(checkpoint, output, torch.float32, overwrite=False)
    assert output.is_dir() and not partial.exists()


PEAK = """
import sys, torch
from pathlib import Path
from pretrain.core.startup import quiet_libraries
quiet_libraries()
from data_pipeline.shards.token_stream import open_split
from data_pipeline.shards.manifest import load_manifest
from pretrain.export.convert import export_hf, export_safetensors
checkpoint, output = Path(sys.argv[1]), Path(sys.argv[2])
heldout = open_split(load_manifest(Path(sys.argv[3])), "validation")
export_hf(checkpoint, output / "hf", heldout, torch.bfloat16, overwrite=False, memory_bytes=0)
export_safetensors(checkpoint, output / "plain", torch.float32, overwrite=False)
status = Path("/proc/self/status").read_text()  # ru_maxrss would begin at the parent's
print(int(status.split("VmHWM:")[1].split()[0]) * 1024)
"""


@pytest.mark.full
def test_peak_memory_is_that_of_the_largest_tensor(trained: Trained, tmp_path: Path) -> None:
    """1.3 GB of weights, of which the largest is 8 MB, in less than 2 x 8 MB + 500 MB."""
    checkpoint = large_checkpoint(tmp_path / "checkpoint", experts=52)
    assert sum(path.stat().st_size for path in checkpoint.iterdir()) > 1.2e9
    command = [sys.executable, "-c", PEAK, str(checkpoint), str(tmp_path), str(trained.data)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
    )
    assert done.returncode == DONE, done.stderr
    assert int(done.stdout) < 2 * 8.4e6 + 500e6
