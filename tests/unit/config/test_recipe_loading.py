"""From a name and overrides to a checked recipe: types, names of wrong fields, duplicate keys, and
the way back to YAML.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pretrain.config.load import apply_override, load_recipe, parse_yaml, recipe_to_yaml
from pretrain.config.timeline import Timeline
from pretrain.core.errors import ConfigError
from pretrain.core.shipped import recipe_names
from pretrain.model.moe.config import DeepSpeedMoEConfig
from pretrain.optim.config import AdamWConfig, SGDConfig
from tests.support.paths import RECIPES, ROOT


def recipe_file(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    "text,value",
    [
        ("2e-3", 2e-3), ("2E6", 2e6), ("-1e+2", -100.0), ("1.5e3", 1500.0), ("2.e-1", 0.2),
        ("0.1", 0.1), ("7", 7), ("true", True),
        ("null", None), ("", None), ("e3", "e3"), ("1e", "1e"), ("run-1", "run-1"),
        ("[1, 2e1]", [1, 20.0]),
        ("{kind: sgd, learning_rate: 1e-1}", {"kind": "sgd", "learning_rate": 0.1}),
    ],
)  # fmt: skip
def test_override_values_are_read_as_yaml_with_scientific_numbers(text: str, value: Any) -> None:
    content: dict[str, Any] = {}
    apply_override(content, f"a.b={text}")
    assert content == {"a": {"b": value}}
    assert type(content["a"]["b"]) is type(value)


def test_overrides_reach_nested_fields_in_order() -> None:
    recipe = load_recipe(
        "debug",
        [
            "optimizer.learning_rate=2e-3", "model.attention.num_key_value_heads=1",
            "train.micro_batch_size=4", "train.micro_batch_size=1",
            "model.moe.aux_loss_weight=0", "name=other", "run_path=runs/a=b",
        ],
    )  # fmt: skip
    assert recipe.optimizer.learning_rate == 2e-3
    assert (
        recipe.model.attention.num_key_value_heads == 1
        and recipe.model.attention.num_attention_heads == 4
    )
    assert recipe.train.micro_batch_size == 1
    assert recipe.model.moe is not None and recipe.model.moe.aux_loss_weight == 0.0
    assert recipe.data_path == "data/other" and recipe.output_path == "runs/a=b"


def test_an_override_replaces_a_component_by_its_kind() -> None:
    recipe = load_recipe(
        "debug",
        [
            "optimizer={kind: sgd, learning_rate: 1e-1}",
            "model.moe.kind=deepspeed",
            "model.moe.drop_tokens=false",
        ],
    )
    assert isinstance(recipe.optimizer, SGDConfig) and isinstance(
        recipe.model.moe, DeepSpeedMoEConfig
    )
    assert isinstance(load_recipe("debug").optimizer, AdamWConfig)


@pytest.mark.parametrize(
    "override,parts",
    [
        ("optimiser.learning_rate=1", ["unknown field 'optimiser'", "did you mean 'optimizer'?"]),
        (
            "train.micro_batchsize=1",
            ["unknown field 'train.micro_batchsize'", "did you mean 'micro_batch_size'"],
        ),
        ("model.moe.topk=1", ["unknown field 'model.moe.topk'", "did you mean 'top_k'?"]),
        (
            "model.moe.capacity_factor=1",
            ["unknown field 'model.moe.capacity_factor'", "it takes ", "num_shared_experts"],
        ),
        (
            "model.attention.num_attn_heads=1",
            [
                "unknown field 'model.attention.num_attn_heads'",
                "did you mean",
                "'num_attention_heads'",
            ],
        ),
        ("optimizer.lr=1", ["unknown field 'optimizer.lr'", "it takes ", "learning_rate"]),
        (
            "data.tokenizer.vocabsize=1",
            ["unknown field 'data.tokenizer.vocabsize'", "did you mean 'vocab_size'?"],
        ),
        (
            "train.micro_batch_size=0",
            ["'train.micro_batch_size'", "greater than or equal to 1", "got 0"],
        ),
        ("train.micro_batch_size=2.5", ["'train.micro_batch_size'", "integer", "got 2.5"]),
        ("train.precision=fp4", ["'train.precision'", "'bf16'", "got 'fp4'"]),
        ("optimizer.learning_rate=fast", ["'optimizer.learning_rate'", "number", "got 'fast'"]),
        ("optimizer.learning_rate=.nan", ["'optimizer.learning_rate'"]),
        (
            "optimizer.kind=adam",
            ["'optimizer.kind' is 'adam'", "one of 'adamw', 'sgd', 'adamw_8bit', 'lion', 'muon'"],
        ),
        ("name=../elsewhere", ["'name'", "got '../elsewhere'"]),
        ("model.moe.top_k=9", ["'model.moe'", "top_k is 9, but there are only 4 experts"]),
        ("train={}", ["'train.sequence_length' is missing", "'train.micro_batch_size' is missing"]),
        (
            "train.micro_batch_size.x=1",
            ["--set train.micro_batch_size.x=1", "'train.micro_batch_size' is a value"],
        ),
        ("train.micro_batch_size", ["--set train.micro_batch_size", "section.field=value"]),
        ("=3", ["--set =3", "section.field=value"]),
        (
            "model.moe={kind: dropless, kind: deepspeed}",
            ["--set model.moe=", "'kind' is there twice"],
        ),
        ("model.moe=[1", ["--set model.moe=[1", "not valid YAML"]),
    ],
)
def test_a_wrong_override_is_named_with_its_path(override: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("debug", [override])
    assert caught.value.exit_code == 2
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_duplicate_keys_in_a_file_are_refused_at_any_depth(tmp_path: Path) -> None:
    text = (
        (RECIPES / "debug.yaml")
        .read_text()
        .replace("  hidden_size: 32\n", "  hidden_size: 32\n  hidden_size: 64\n")
    )
    with pytest.raises(
        ConfigError,
        match=r"mine\.yaml is not valid YAML: the key 'hidden_size' is there twice.*line",
    ):
        load_recipe(recipe_file(tmp_path, text))


@pytest.mark.parametrize(
    "text,part",
    [("just words", "holds no mapping"), ("a: [1", "is not valid YAML"), ("", "holds no mapping")],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path: Path, text: str, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe_file(tmp_path, text))
    assert part in str(caught.value) and "mine.yaml" in str(caught.value)


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\x00name")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        load_recipe(str(tmp_path / "mine.yaml"))


def test_an_unknown_recipe_gets_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"no recipe 'debgu'.*did you mean 'debug'"):
        load_recipe("debgu")
    with pytest.raises(ConfigError, match=r"shipped recipes are .*debug.*quickstart"):
        load_recipe("somewhere/else.yaml")


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_survives_the_way_through_yaml(tmp_path: Path, name: str) -> None:
    recipe = load_recipe(name, ["optimizer.learning_rate=1e-5", "model.vocab_size=100"])
    again = load_recipe(recipe_file(tmp_path, recipe_to_yaml(recipe)))
    assert again == recipe
    assert again != load_recipe(name)


def test_a_recipe_cannot_be_changed_after_its_check() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load_recipe("debug").train.micro_batch_size = 3


def test_steps_are_derived_from_tokens_and_rounded_up() -> None:
    assert Timeline(load_recipe("debug", ["train.train_tokens=10240"])).num_steps == 20
    assert Timeline(load_recipe("debug", ["train.train_tokens=10241"])).num_steps == 21


@pytest.mark.parametrize("vocab_size,padded", [(64, 64), (65, 128), (100, 128)])
def test_the_vocabulary_is_padded_to_its_multiple(vocab_size: int, padded: int) -> None:
    assert (
        load_recipe("debug", [f"model.vocab_size={vocab_size}"]).model.padded_vocab_size == padded
    )


def test_yaml_cannot_construct_python_objects() -> None:
    with pytest.raises(ConfigError, match="not valid YAML"):
        parse_yaml("!!python/object/apply:os.getcwd []", "the text")


def test_loading_a_recipe_needs_neither_torch_nor_deepspeed() -> None:
    """A wrong option must be answered at once, not after seconds of imports."""
    code = (
        "import sys; from pretrain.config.load import load_recipe; load_recipe('debug');"
        " print({'torch', 'deepspeed'} & sys.modules.keys())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert result.stdout.strip() == "set()"
