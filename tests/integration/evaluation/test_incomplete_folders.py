"""A Hugging Face folder in which something is missing, too much or damaged is refused by every
tool, and what it is is named.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_pipeline.tokenizer.tokenizer import Tokenizer
from pretrain.core.errors import BAD_CHECKPOINT, CheckpointError
from pretrain.evaluation.generation.generators import open_transformers
from pretrain.export.custom.target import Custom
from pretrain.export.hf_folder import write_hf_folder
from pretrain.export.targets import choose_target
from pretrain.export.writer import WEIGHTS
from tests.support.custom_exports import weights_of
from tests.support.hf_folders import (
    Change,
    both_weights,
    changed_tensor,
    copy_of,
    edit_json,
    edit_weights,
    escaping_index,
    fused_experts,
    missing_shard,
    sharded,
    truncated,
    with_tensor,
    without,
    without_expert,
    wrong_index,
)
from tests.support.in_memory_tensors import InMemoryTensors
from tests.support.random_checkpoint import random_model, recipe_of, small_tokenizer
from tests.support.tiny_checkpoint import Trained
from tests.support.tool_runs import Done, run_here

CPU = torch.device("cpu")
EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
NORM = "model.layers.1.post_attention_layernorm.weight"


def edit(name: str = "config.json", **fields: object) -> Change:
    return lambda folder: edit_json(folder, name, **fields)


def written(name: str, content: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content) and None


def removed(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


# What is changed, and what the error has to say. Marked with *: --from hf takes it, or says it in
# its own words.
DAMAGES: dict[str, tuple[Change, str]] = {
    "no head": (without("lm_head.weight"), "'lm_head.weight'"),
    "no norm": (without(NORM), f"'{NORM}'"),
    "no head and no norm": (without("lm_head.weight", NORM), "'lm_head.weight'"),
    "one matrix of one expert": (without(EXPERT), f"'{EXPERT}'"),
    "one expert in all layers": (without_expert(2), ".experts.2."),
    "the last expert in all layers": (without_expert(3), ".experts.3."),
    "an expert too many": (
        with_tensor(EXPERT.replace(".2.", ".4."), torch.zeros(32, 32)),
        f"'{EXPERT.replace('.2.', '.4.')}'",
    ),
    "an unknown tensor": (with_tensor("model.surprise", torch.zeros(2)), "'model.surprise'"),
    "a layer too many": (
        with_tensor("model.layers.2.input_layernorm.weight", torch.zeros(32)),
        "model.layers.2.",
    ),
    "a shorter norm": (changed_tensor(NORM, lambda tensor: tensor[:-1]), NORM),
    "a shorter expert": (changed_tensor(EXPERT, lambda tensor: tensor[:-1]), EXPERT),
    "a norm as a matrix": (changed_tensor(NORM, lambda tensor: tensor[None]), NORM),
    "a tensor of no numbers": (changed_tensor(NORM, lambda tensor: tensor[:0]), NORM),
    "a head in eight bits": (
        changed_tensor("lm_head.weight", lambda tensor: tensor.to(torch.float8_e4m3fn)),
        "lm_head.weight",
    ),
    "a norm of NaN": (changed_tensor(NORM, lambda tensor: tensor * torch.nan), ""),
    "one infinite number": (
        changed_tensor(
            "lm_head.weight", lambda tensor: tensor.index_fill(0, torch.tensor([3]), torch.inf)
        ),
        "",
    ),
    "a file that was cut off": (truncated, WEIGHTS),
    "an empty file": (written(WEIGHTS, b""), WEIGHTS),
    "a file that is no safetensors": (written(WEIGHTS, b"PK\x03\x04" * 100), WEIGHTS),
    "no weights": (removed(WEIGHTS), "weights are missing"),
    "a missing shard": (missing_shard, "model-00002-of-00002.safetensors"),
    "an index of another place": (wrong_index, "index.json"),
    "an index that leaves its folder": (escaping_index, "'../model-0000"),
    "one file and shards": (both_weights, "both"),
    "another vocab_size": (edit(vocab_size=64), "vocab_size|embed_tokens|ids up to"),
    "a huge vocab_size": (edit(vocab_size=10**11), "embed_tokens|vocab_size"),
    "another hidden_size": (edit(hidden_size=64), "instead of"),
    "a layer less": (edit(num_hidden_layers=1), "model.layers.1."),
    "a layer more": (edit(num_hidden_layers=3), "model.layers.2."),
    "a billion layers": (edit(num_hidden_layers=10**9), "num_hidden_layers"),
    "a billion experts": (edit(num_experts=10**9), "num_experts"),
    "an expert more in the config": (edit(num_experts=5), ".experts.4."),
    "a width of text": (edit(hidden_size="wide"), "config.json"),
    "no heads *": (edit(num_attention_heads=0), "transformers cannot open"),
    "a head that is tied, with other numbers": (edit(tie_word_embeddings=True), "lm_head.weight"),
    "a config that is no JSON": (written("config.json", b'{"model_type": '), "not valid JSON"),
    "a config that is a list": (written("config.json", b"[1]"), "no JSON object"),
    "a config nested without end": (
        written("config.json", b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}"),
        "nested too deeply",
    ),
    "a config without a type": (edit(model_type=None), "model_type"),
    "a config of bytes": (written("config.json", b"\xff\xfe\x00"), "is not UTF-8"),
    "no tokenizer *": (removed("tokenizer.json"), "no tokenizer.json"),
    "a tokenizer that is no JSON": (written("tokenizer.json", b"{"), "tokenizer"),
    "a tokenizer config that is no JSON": (
        written("tokenizer_config.json", b"{"),
        "tokenizer_config.json",
    ),
    "no end of document *": (edit("tokenizer_config.json", eos_token=None), "eos_token"),
}


def run_tools(folder: Path, trained: Trained, output: Path) -> dict[str, Done]:
    heldout = ("--data", trained.data, "--max-windows", "1")
    return {
        "generate": run_here(
            "generate.py", "--model", folder, "--prompt", "1", "--max-new-tokens", "1"
        ),
        "evaluate": run_here("evaluate.py", "--checkpoint", folder, *heldout),
        "tasks": run_here("evaluate.py", "--checkpoint", folder, "--tasks", "any_task"),
        "convert": run_here("convert_checkpoint.py", "--from", "hf", folder, "--output", output),
    }


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_by_every_tool(
    damage: str, trained: Trained, exported: Path, tmp_path: Path
) -> None:
    change, words = DAMAGES[damage]
    folder = copy_of(exported, tmp_path / "folder", change)
    for tool, done in run_tools(folder, trained, tmp_path / "converted").items():
        if tool == "convert" and damage.endswith("*"):
            continue
        assert done.returncode == BAD_CHECKPOINT and done.stdout == "", (tool, done)
        assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr, (
            tool,
            done.stderr,
        )
        assert any(word in done.stderr for word in words.split("|")) or tool == "convert", (
            tool,
            done.stderr,
        )
        if tool != "convert":
            assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, (
                tool,
                done.stderr,
            )
    assert damage.endswith("*") or not (tmp_path / "converted").exists()


@pytest.mark.parametrize(
    "damage", ["no head", "one matrix of one expert", "a file that was cut off"]
)
def test_a_damaged_baseline_is_refused_by_name(
    damage: str, trained: Trained, exported: Path, tmp_path: Path
) -> None:
    folder = copy_of(exported, tmp_path / "folder", DAMAGES[damage][0])
    done = run_here(
        "evaluate.py",
        "--checkpoint",
        trained.latest,
        "--data",
        trained.data,
        "--max-windows",
        "1",
        "--baselines",
        folder,
    )
    assert (
        done.returncode == BAD_CHECKPOINT
        and DAMAGES[damage][1] in done.stderr
        and str(folder) in done.stderr
        and "Traceback" not in done.stderr
    )


def test_tools_that_take_checkpoints_alone_say_how_to_convert_a_folder(
    exported: Path, tmp_path: Path
) -> None:
    output = ("--output", tmp_path / "out")
    runs = [
        run_here("inspect_checkpoint.py", "--checkpoint", exported),
        run_here(
            "merge_checkpoints.py",
            "soup",
            "--checkpoints",
            exported,
            exported,
            "--weights",
            "1",
            "1",
            *output,
        ),
        run_here("merge_checkpoints.py", "shards", "--checkpoint", exported, *output),
        run_here(
            "upcycle.py", "--checkpoint", exported, "--num-experts", "4", "--top-k", "2", *output
        ),
        run_here("convert_checkpoint.py", "--checkpoint", exported, "--to", "safetensors", *output),
    ]
    for done in runs:
        assert (
            done.returncode == BAD_CHECKPOINT
            and "convert it with tools/convert_checkpoint.py --from hf" in done.stderr
        ), done
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


@pytest.fixture(scope="module")
def own_class(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    recipe = recipe_of("h64lm_mini")
    folder = tmp_path_factory.mktemp("own") / "hf"
    folder.mkdir()
    write_hf_folder(
        folder, Custom(), recipe.model, InMemoryTensors(weights_of(random_model(recipe))), tokenizer
    )
    return folder


def test_every_tensor_of_an_export_of_our_own_class_has_to_be_there(
    own_class: Path, tmp_path: Path
) -> None:
    open_transformers(own_class, CPU)
    names = list(load_file(own_class / WEIGHTS))
    kinds = {name.split(".", 2)[-1] if name.startswith("layers.") else name: name for name in names}
    assert len(kinds) > 8
    for number, name in enumerate(kinds.values()):
        folder = copy_of(own_class, tmp_path / str(number), without(name))
        with pytest.raises(CheckpointError, match=f"'{name}' is missing"):
            open_transformers(folder, CPU)
        edit_weights(
            folder,
            lambda tensors, name=name: tensors | {name: load_file(own_class / WEIGHTS)[name][:-1]},
        )
        with pytest.raises(CheckpointError, match=f"'{name}' is .* instead of"):
            open_transformers(folder, CPU)


@pytest.mark.parametrize(
    "name",
    [
        "gpt_oss_20b_mini",
        "deepseek_v3_mini",
        pytest.param("mixtral_8x7b_mini", marks=pytest.mark.full),
        pytest.param("deepseek_moe_16b_mini", marks=pytest.mark.full),
    ],
)
def test_every_kind_of_tensor_of_a_published_architecture_has_to_be_there(
    name: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    recipe = recipe_of(name)
    source = tmp_path / "source"
    source.mkdir()
    model = random_model(recipe)
    write_hf_folder(
        source, choose_target(recipe), recipe.model, InMemoryTensors(weights_of(model)), tokenizer
    )
    open_transformers(source, CPU)
    tensors = load_file(source / WEIGHTS)
    kinds = {
        tuple(part for part in tensor.split(".") if not part.isdigit()): tensor
        for tensor in tensors
    }
    for missing in kinds.values():
        save_file(
            {tensor: value for tensor, value in tensors.items() if tensor != missing},
            source / WEIGHTS,
            metadata={"format": "pt"},
        )
        with pytest.raises(CheckpointError, match=f"'{missing}' is missing"):
            open_transformers(source, CPU)


WHOLE: dict[str, Change] = {
    "shards and an index": lambda folder: sharded(folder) and None,
    "frequencies that old files hold": with_tensor(
        "model.layers.0.self_attn.rotary_emb.inv_freq", torch.zeros(4)
    ),
    "experts in two tensors a layer": fused_experts,
    "notes of other programs": written("README.md", b"code: [](evil.py)"),
    "a pickle that nobody reads": written("training_args.bin", b"\x80"),
    "a path of somebody's machine": edit(
        "tokenizer_config.json",
        tokenizer_file="/home/somebody/tokenizer.json",
        name_or_path="somebody/model",
    ),
}


@pytest.mark.parametrize("case", WHOLE)
def test_whole_folders_in_other_forms_open_with_the_same_numbers(
    case: str, exported: Path, tmp_path: Path
) -> None:
    first, other = (
        open_transformers(exported, CPU),
        open_transformers(copy_of(exported, tmp_path / "folder", WHOLE[case]), CPU),
    )
    ids_BS = torch.tensor([first.encode("11 + 2 = 13")])
    assert (
        other.encode("11 + 2 = 13") == ids_BS[0].tolist()
        and other.decode(ids_BS[0].tolist()) == "11 + 2 = 13"
    )
    with torch.inference_mode():
        assert torch.equal(first.model(ids_BS).logits, other.model(ids_BS).logits)


def test_a_tied_head_may_be_stored_once_or_twice(tmp_path: Path, tokenizer: Tokenizer) -> None:
    recipe = recipe_of("debug", "model.tie_word_embeddings=true")
    (tmp_path / "once").mkdir()
    write_hf_folder(
        tmp_path / "once",
        choose_target(recipe),
        recipe.model,
        InMemoryTensors(weights_of(random_model(recipe))),
        tokenizer,
    )
    tensors = load_file(tmp_path / "once" / WEIGHTS)
    assert "lm_head.weight" not in tensors
    embedding = tensors["model.embed_tokens.weight"]
    twice = copy_of(
        tmp_path / "once", tmp_path / "twice", with_tensor("lm_head.weight", embedding.clone())
    )
    logits = [
        open_transformers(folder, CPU).model(torch.tensor([[1, 2, 3]])).logits
        for folder in (tmp_path / "once", twice)
    ]
    assert torch.equal(*logits)
    edit_weights(twice, lambda tensors: tensors | {"lm_head.weight": embedding + 1})
    with pytest.raises(CheckpointError, match=r"tie_word_embeddings"):
        open_transformers(twice, CPU)
    edit_weights(
        twice,
        lambda tensors: {
            "lm_head.weight": embedding,
            **{name: tensors[name] for name in tensors if "embed" not in name},
        },
    )
    open_transformers(twice, CPU)
