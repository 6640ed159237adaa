"""No code that a Hugging Face folder holds or names is ever run, by any tool."""

from __future__ import annotations

import ast
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_pipeline.tokenizer.tokenizer import Tokenizer
from pretrain.core.errors import BAD_CHECKPOINT
from pretrain.evaluation.generation.generators import open_transformers
from pretrain.export.custom.target import AUTO_MAP, CLASS_FILES, Custom
from pretrain.export.hf_folder import write_hf_folder
from pretrain.export.writer import WEIGHTS
from tests.support.custom_exports import recipe_of, weights_of
from tests.support.hf_folders import copy_of, edit_json, evil_code, pickled
from tests.support.in_memory_tensors import InMemoryTensors
from tests.support.paths import ROOT
from tests.support.random_checkpoint import random_model, small_tokenizer
from tests.support.tiny_checkpoint import Trained
from tests.support.tool_runs import Done, run_here

CPU = torch.device("cpu")
EVIL = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
TOKENIZER = ["evil.Tokenizer", "evil.Tokenizer"]
Attack = Callable[[Path, Path], None]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


@pytest.fixture(scope="module")
def own_class(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """An export that our own class travels with."""
    recipe = recipe_of("position=learned")
    recipe = recipe.model_copy(
        update={"model": recipe.model.model_copy(update={"vocab_size": 300})}
    )
    folder = tmp_path_factory.mktemp("own") / "hf"
    folder.mkdir()
    write_hf_folder(
        folder, Custom(), recipe.model, InMemoryTensors(weights_of(random_model(recipe))), tokenizer
    )
    return folder


def evil_module(folder: Path, canary: Path, name: str = "evil.py") -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(evil_code(canary))


def named_by_auto_map(folder: Path, canary: Path) -> None:
    evil_module(folder, canary)
    edit_json(folder, auto_map=EVIL)


def of_an_unknown_type(folder: Path, canary: Path) -> None:
    named_by_auto_map(folder, canary)
    edit_json(folder, model_type="evil")


def changed_model_file(folder: Path, canary: Path) -> None:
    with (folder / "modeling_moe_pretrain.py").open("a") as file:
        file.write(evil_code(canary))


def changed_config_file(folder: Path, canary: Path) -> None:
    path = folder / "configuration_moe_pretrain.py"
    path.write_text(evil_code(canary) + path.read_text())


def link_to_code(folder: Path, canary: Path) -> None:
    outside = folder.with_name("outside.py")
    outside.write_text(evil_code(canary) + (folder / "modeling_moe_pretrain.py").read_text())
    (folder / "modeling_moe_pretrain.py").unlink()
    (folder / "modeling_moe_pretrain.py").symlink_to(outside)


def link_to_a_folder_of_code(folder: Path, canary: Path) -> None:
    outside = folder.with_name("outside")
    outside.mkdir()
    evil_module(outside, canary)
    (folder / "package").symlink_to(outside)


def our_files_in_a_subfolder(folder: Path, canary: Path) -> None:
    (folder / "package").mkdir()
    shutil.copy(CLASS_FILES[0], folder / "package")


def code_beside_ours(folder: Path, canary: Path) -> None:
    evil_module(folder, canary)
    edit_json(folder, auto_map={**AUTO_MAP, "AutoTokenizer": TOKENIZER})


def code_of_a_tokenizer(folder: Path, canary: Path) -> None:
    evil_module(folder, canary)
    edit_json(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": TOKENIZER})


def old_form_of_a_tokenizer(folder: Path, canary: Path) -> None:
    edit_json(folder, "tokenizer_config.json", auto_map=TOKENIZER)


def of_another_repository(folder: Path, canary: Path) -> None:
    edit_json(folder, auto_map={name: f"other/repo--{place}" for name, place in AUTO_MAP.items()})


def code_of_a_processor(folder: Path, canary: Path) -> None:
    edit_json(folder, "processor_config.json", auto_map={"AutoProcessor": "evil.Processor"})


def code_of_a_preprocessor(folder: Path, canary: Path) -> None:
    edit_json(
        folder,
        "preprocessor_config.json",
        image_processor={"auto_map": {"AutoImageProcessor": "evil.Processor"}},
    )


def code_of_a_section(folder: Path, canary: Path) -> None:
    edit_json(folder, text_config={"auto_map": EVIL})


def code_of_generation(folder: Path, canary: Path) -> None:
    evil_module(folder, canary, "custom_generate/generate.py")


def another_config_file(folder: Path, canary: Path) -> None:
    shutil.copy(folder / "config.json", folder / "config.4.0.0.json")
    edit_json(folder, "config.4.0.0.json", auto_map=EVIL)
    edit_json(folder, configuration_files=["config.4.0.0.json"])


def kernel_of_the_hub(folder: Path, canary: Path) -> None:
    edit_json(folder, attn_implementation={"text_config": "evil/kernel"})


def weights_of_another_name(folder: Path, canary: Path) -> None:
    edit_json(folder, transformers_weights="other.safetensors")


def class_that_is_no_tokenizer(folder: Path, canary: Path) -> None:
    edit_json(folder, "tokenizer_config.json", tokenizer_class="RagRetriever")


def weights_as_a_pickle(folder: Path, canary: Path) -> None:
    (folder / WEIGHTS).unlink()
    pickled(folder, canary)


def compiled_code(folder: Path, canary: Path) -> None:
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "evil.cpython-311.pyc").write_bytes(b"")


def code_in_capitals(folder: Path, canary: Path) -> None:
    evil_module(folder, canary, "EVIL.PY")


def pipe_that_never_ends(folder: Path, canary: Path) -> None:
    (folder / "modeling_moe_pretrain.py").unlink()
    os.mkfifo(folder / "modeling_moe_pretrain.py")


NATIVE = (
    named_by_auto_map,
    of_an_unknown_type,
    code_of_a_tokenizer,
    old_form_of_a_tokenizer,
    of_another_repository,
    code_of_a_processor,
)
NATIVE += (
    code_of_a_preprocessor,
    code_of_a_section,
    code_of_generation,
    another_config_file,
    kernel_of_the_hub,
    weights_of_another_name,
)
NATIVE += (
    weights_as_a_pickle,
    our_files_in_a_subfolder,
    compiled_code,
    code_in_capitals,
    link_to_a_folder_of_code,
)
OWN = (
    named_by_auto_map,
    of_an_unknown_type,
    changed_model_file,
    changed_config_file,
    link_to_code,
    code_beside_ours,
    code_of_a_tokenizer,
)
OWN += (
    of_another_repository,
    code_of_generation,
    class_that_is_no_tokenizer,
    pipe_that_never_ends,
    our_files_in_a_subfolder,
    code_of_a_section,
)
CASES = [("exported", attack) for attack in NATIVE] + [("own_class", attack) for attack in OWN]


def run_tools(folder: Path, trained: Trained, output: Path) -> dict[str, Done]:
    """Every tool that opens a Hugging Face folder.

    The harness opens it as generation does, before it loads its tasks.
    """
    evaluate = ("evaluate.py", "--checkpoint", folder, "--data", trained.data, "--max-windows", "1")
    runs = {
        "generate": run_here(
            "generate.py", "--model", folder, "--prompt", "1", "--max-new-tokens", "1"
        ),
        "evaluate": run_here(*evaluate),
        "tasks": run_here("evaluate.py", "--checkpoint", folder, "--tasks", "any_task"),
        "convert": run_here("convert_checkpoint.py", "--from", "hf", folder, "--output", output),
    }
    if folder.name == "baseline":
        options = ("--baselines", folder, "--max-windows", "1")
        runs["baseline"] = run_here(
            "evaluate.py", "--checkpoint", trained.latest, "--data", trained.data, *options
        )
    return runs


@pytest.mark.parametrize(
    "source,attack", [pytest.param(*case, id=f"{case[0]}-{case[1].__name__}") for case in CASES]
)
def test_code_in_a_folder_is_never_run(
    source: str, attack: Attack, request: pytest.FixtureRequest, trained: Trained, tmp_path: Path
) -> None:
    canary = tmp_path / "canary"
    name = "baseline" if attack is named_by_auto_map else "folder"
    folder = copy_of(
        request.getfixturevalue(source), tmp_path / name, lambda folder: attack(folder, canary)
    )
    for tool, done in run_tools(folder, trained, tmp_path / "converted").items():
        if (tool, attack) == ("convert", class_that_is_no_tokenizer):
            continue  # it reads tokenizer.json alone; the model_type is none that it converts
        assert done.returncode == BAD_CHECKPOINT, (tool, done)
        assert (
            done.stderr.startswith("error: ")
            and done.stderr.count("\n") == 1
            and str(folder) in done.stderr
        ), (tool, done.stderr)
    assert not canary.exists() and not (tmp_path / "converted").exists()


def test_the_canary_would_be_written_if_the_code_ran(
    own_class: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    for attack in (code_of_a_tokenizer, changed_model_file):
        canary = tmp_path / attack.__name__
        folder = copy_of(
            own_class,
            tmp_path / f"of_{attack.__name__}",
            lambda folder, attack=attack, canary=canary: attack(folder, canary),
        )
        if attack is code_of_a_tokenizer:
            AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        else:
            get_class_from_dynamic_module(AUTO_MAP["AutoModelForCausalLM"], str(folder))
        assert canary.read_text() == "imported"
    pickled(tmp_path, tmp_path / "third")
    with (tmp_path / "pytorch_model.bin").open("rb") as file:
        pickle.load(file)
    assert (tmp_path / "third").read_text() == "unpickled"


def test_what_runs_is_our_own_file_whatever_lies_in_the_cache_of_modules(
    own_class: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also from a folder of links, as the hub's cache has them, and without its copies of our
    files.
    """
    canary = tmp_path / "canary"
    modules = tmp_path / "modules" / "transformers_modules" / "hf"
    modules.mkdir(parents=True)
    for path in (*CLASS_FILES, Path("__init__.py")):
        (modules / path.name).write_text(evil_code(canary))
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    linked = tmp_path / "models--own--hf" / "snapshots" / "0123"
    linked.mkdir(parents=True)
    blobs = linked.parent.parent / "blobs"
    for number, path in enumerate(sorted(shutil.copytree(own_class, blobs).iterdir())):
        # Content without a name, as the hub's cache keeps it.
        (linked / path.name).symlink_to(f"../../blobs/{number}")
        path.rename(blobs / str(number))
    bare = copy_of(
        own_class,
        tmp_path / "bare",
        lambda folder: [(folder / path.name).unlink() for path in CLASS_FILES] and None,
    )
    for folder in (linked, bare):
        assert (
            type(open_transformers(folder, CPU).model).__module__
            == "pretrain.export.custom.modeling_moe_pretrain"
        )
    assert not canary.exists()


def test_only_what_was_checked_is_opened(exported: Path, tmp_path: Path) -> None:
    """Neither an adapter, nor pickles beside the weights, nor the files of a distributed
    checkpoint, which transformers would prefer.
    """
    canary = tmp_path / "canary"

    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        other = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        save_file(
            other,
            folder / "shard-00000-model-00001-of-00001.safetensors",
            metadata={"format": "pt"},
        )
        edit_json(
            folder, "adapter_config.json", base_model_name_or_path=str(tmp_path), peft_type="LORA"
        )
        for name in ("adapter_model.bin", ".metadata", "training_args.bin", "pytorch_model.bin"):
            pickled(folder, canary, name)

    plain, crowded = (
        open_transformers(path, CPU).model
        for path in (exported, copy_of(exported, tmp_path / "folder", change))
    )
    ids_BS = torch.arange(1, 9)[None]
    with torch.inference_mode():
        assert torch.equal(plain(ids_BS).logits, crowded(ids_BS).logits)
    assert not canary.exists()


def test_a_chat_template_is_data(own_class: Path, tmp_path: Path) -> None:
    """It is run in a sandbox, and only by whoever asks for it."""
    from jinja2.exceptions import SecurityError

    canary = tmp_path / "canary"
    code = (
        f"().__class__.__base__.__subclasses__()[0].__init__.__globals__['open']('{canary}', 'w')"
    )
    folder = copy_of(
        own_class,
        tmp_path / "folder",
        lambda folder: (folder / "chat_template.jinja").write_text(f"{{{{ {code} }}}}") and None,
    )
    tokenizer = open_transformers(folder, CPU).tokenizer
    assert code in str(tokenizer.chat_template)
    with pytest.raises(SecurityError):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert not canary.exists()


MODEL = "AutoModelForCausalLM"
SIDE_CONFIGS = (
    "tokenizer_config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
    "feature_config.json",
)
# Values of auto_map in config.json: None is the key's absence, which is no attack.
AUTO_MAPS: dict[str, object] = {
    "one foreign class beside ours": {**AUTO_MAP, "AutoModel": "evil.Model"},
    "a foreign tokenizer beside ours": {**AUTO_MAP, "AutoTokenizer": TOKENIZER},
    "a tokenizer with one class": {**AUTO_MAP, "AutoTokenizer": [None, "evil.Tokenizer"]},
    "a processor beside ours": {**AUTO_MAP, "AutoProcessor": "evil.Processor"},
    "a feature extractor beside ours": {**AUTO_MAP, "AutoFeatureExtractor": "evil.Processor"},
    "a foreign config": {**AUTO_MAP, "AutoConfig": "evil.Config"},
    "a foreign model": {**AUTO_MAP, MODEL: "evil.Model"},
    "all foreign": EVIL,
    "another class of our module": {**AUTO_MAP, MODEL: "modeling_moe_pretrain.os"},
    "our class of another module": {**AUTO_MAP, MODEL: "evil.MoePretrainForCausalLM"},
    "a module in a folder": {**AUTO_MAP, MODEL: "package.evil.Model"},
    "a module above": {**AUTO_MAP, MODEL: "..evil.Model"},
    "a path": {**AUTO_MAP, MODEL: "../evil.Model"},
    "an absolute path": {**AUTO_MAP, MODEL: "/tmp/evil.Model"},
    "another repository": {**AUTO_MAP, MODEL: "other/repo--evil.Model"},
    "another folder": {**AUTO_MAP, MODEL: "./package--evil.Model"},
    "a list of classes": {**AUTO_MAP, MODEL: [AUTO_MAP[MODEL], "evil.Model"]},
    "a dictionary": {**AUTO_MAP, MODEL: {"x": "evil.Model"}},
    "a key with a space": {**AUTO_MAP, "AutoModel ": "evil.Model"},
    "capitals": {**AUTO_MAP, MODEL: "EVIL.Model"},
    "no text": {**AUTO_MAP, MODEL: 5},
    "one class less": {MODEL: AUTO_MAP[MODEL]},
    "text": "evil.Model",
    "a list": ["evil.Model"],
    "a number": 1,
}


def refused_by_generate(folder: Path, canary: Path) -> None:
    done = run_here("generate.py", "--model", folder, "--prompt", "1", "--max-new-tokens", "1")
    assert done.returncode == BAD_CHECKPOINT, done
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert str(folder) in done.stderr and not canary.exists()


def evil_everywhere(folder: Path, canary: Path) -> None:
    """Modules of every name that a payload has, as files that are no code by their suffix."""
    for name in ("evil.py.txt", "EVIL.txt"):
        (folder / name).write_text(evil_code(canary))


@pytest.mark.parametrize("name", AUTO_MAPS)
@pytest.mark.parametrize("with_code", [True, False])
def test_an_auto_map_names_our_classes_alone(
    name: str, with_code: bool, own_class: Path, tmp_path: Path
) -> None:
    """With the code that it names in the folder, and without: then it may be anywhere else."""
    canary = tmp_path / "canary"
    folder = copy_of(own_class, tmp_path / "folder")
    (evil_module if with_code else evil_everywhere)(folder, canary)
    edit_json(folder, auto_map=AUTO_MAPS[name])
    refused_by_generate(folder, canary)


@pytest.mark.parametrize("file", SIDE_CONFIGS)
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_no_other_config_has_an_auto_map(
    file: str, depth: int, own_class: Path, tmp_path: Path
) -> None:
    """At any depth, also one that names our own classes: nothing reads it."""
    canary = tmp_path / "canary"
    content: dict[str, object] = {"auto_map": {"AutoTokenizer": TOKENIZER}}
    for _ in range(depth):
        content = {"section": [content]}
    folder = copy_of(own_class, tmp_path / "folder")
    evil_everywhere(folder, canary)
    edit_json(folder, file, **content)
    refused_by_generate(folder, canary)


@pytest.mark.parametrize(
    "name", ["evil.so", "evil.cpython-311-x86_64-linux-gnu.so", "evil.pyc", "evil.pyd", "a/evil.py"]
)
def test_no_file_of_code_but_ours_is_in_the_folder(
    name: str, own_class: Path, tmp_path: Path
) -> None:
    canary = tmp_path / "canary"
    folder = copy_of(own_class, tmp_path / "folder")
    evil_module(folder, canary, name)
    refused_by_generate(folder, canary)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS, "notes.txt"]
)
def test_a_link_to_a_file_elsewhere_is_refused(name: str, own_class: Path, tmp_path: Path) -> None:
    folder = copy_of(own_class, tmp_path / "folder")
    outside = tmp_path / "outside"
    outside.write_text("secret")
    if (folder / name).exists():
        shutil.move(folder / name, outside)
    (folder / name).symlink_to(outside)
    refused_by_generate(folder, tmp_path / "canary")


def names_in(path: Path) -> set[str]:
    """Attributes that are read and keywords that are given, anywhere in a file."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    return attributes | {node.arg for node in nodes if isinstance(node, ast.keyword) and node.arg}


def test_one_module_alone_opens_folders() -> None:
    door = ROOT / "pretrain" / "export" / "hf_open.py"
    opening = {
        "from_pretrained",
        "from_config",
        "trust_remote_code",
        "get_class_from_dynamic_module",
    }
    files = [
        path
        for package in ("pretrain", "data_pipeline", "tools", "launchers")
        for path in (ROOT / package).rglob("*.py")
    ]
    found = [
        path
        for path in files
        if names_in(path) & opening and not path.name.endswith("_moe_pretrain.py")
    ]
    assert len(files) > 100 and found == [door]
