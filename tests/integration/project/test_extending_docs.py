"""The examples of docs/extending*.md are a package that works."""

from __future__ import annotations

import gzip
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PAGES = sorted((ROOT / "docs").glob("extending*.md"))
EXAMPLE = re.compile(r"```python\n# (\w+)\.py\n(.*?)```\n(.*?)\n(?:\n|$)", re.DOTALL)
SETTING = re.compile(r'`--set "(.*)"`')
# Loads the recipe with the example's kind, saves and reads it again, and imports what the kind
# stands for.
CHECK = """
import sys
from pretrain.config.load import load_recipe, parse_yaml, recipe_to_yaml, validate_recipe
from pretrain.core.plugins import load_plugins
from pretrain.core.registry import Component
from pretrain.export.architectures.target import ExportTarget
load_plugins(["my_parts." + sys.argv[1]])
recipe = load_recipe("debug", sys.argv[2:])
assert recipe.plugins == ["my_parts." + sys.argv[1]]
assert validate_recipe(parse_yaml(recipe_to_yaml(recipe), "saved"), "saved") == recipe
kinds, families = [], [Component, ExportTarget]
while families:
    family = families.pop()
    families += family.__subclasses__()
    kinds += [family] if family.__module__.startswith("my_parts") else []
for kind in kinds:
    if issubclass(kind, Component) and hasattr(kind, "implementation"):
        assert callable(kind.implementing_class())
"""


def examples() -> list[tuple[str, str, str]]:
    """The file's name, its text and what follows it, for each example of the pages."""
    return [found for page in PAGES for found in EXAMPLE.findall(page.read_text())]


# The norm of the page has a parameter that initialisation and parameter counts do not know.
NORM = """
from pretrain.config.load import load_recipe
from pretrain.core.plugins import load_plugins
from pretrain.model.decoder import DecoderLM
from pretrain.model.init import initialize
from pretrain.model.sizes import model_size
load_plugins(["my_parts.norm"])
model = load_recipe("debug", ["model.norm={kind: dynamic_tanh}", "model.vocab_size=300"]).model
built = DecoderLM(model)
initialize(built, seed=1)
values = dict(built.named_parameters())
alphas = [value.item() for name, value in values.items() if name.endswith("norm.alpha")]
assert len(alphas) > 2 and set(alphas) == {0.5}, alphas
size = model_size(model, 64)
outside = [value for name, value in values.items() if "norm." in name and ".attention." not in name]
norms = sum(value.numel() for value in outside)
assert size.components["norms"] == norms, size.components
"""
# It needs a matrix' shape, and its class says nothing of ZeRO's partitions.
WHOLE = """
import torch
from pretrain.core.errors import ConfigError
from pretrain.optim.config import AdamWConfig
from pretrain.optim.param_groups import build_optimizer

class Lars(AdamWConfig):
    needs_whole_matrices = True

    def implementing_class(self):
        return lambda groups, config: torch.optim.SGD(groups, lr=0.1)

try:
    build_optimizer([{"params": [torch.nn.Parameter(torch.ones(2, 2))]}], Lars(learning_rate=1e-2))
except ConfigError as error:
    assert "MatrixOptimizer" in str(error)
else:
    raise AssertionError("it was built")
"""


def run_script(script: str, folder: Path, *arguments: str | Path) -> str:
    """Run a script that finds the package in ``folder``, and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=ROOT,
        env={"PYTHONPATH": f"{folder}:{ROOT}", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_parameter_of_a_plugin_keeps_its_initial_value_and_is_counted(tmp_path: Path) -> None:
    (tmp_path / "my_parts").mkdir()
    (text,) = (text for name, text, _ in examples() if name == "norm")
    (tmp_path / "my_parts" / "norm.py").write_text(text)
    run_script(NORM, tmp_path)


def test_an_optimizer_that_needs_whole_matrices_is_built_for_them(tmp_path: Path) -> None:
    run_script(WHOLE, tmp_path)


@pytest.mark.parametrize("name,text,after", examples(), ids=lambda value: str(value)[:12])
def test_an_example_works(name: str, text: str, after: str, tmp_path: Path) -> None:
    (tmp_path / "my_parts").mkdir()
    (tmp_path / "my_parts" / f"{name}.py").write_text(text)
    run_script(CHECK, tmp_path, name, *SETTING.findall(after))


READ_TOKENIZER = """
import sys
from my_parts.tokenizer import GzippedTokenizer
from data_pipeline.tokenizer.configured import load_configured
from pretrain.core.errors import DataError
for path in sys.argv[1:]:
    try:
        load_configured(GzippedTokenizer(kind="gzipped", path=path))
    except DataError as error:
        print(error)
"""


def test_the_example_of_a_tokenizer_reports_a_file_that_it_cannot_read(tmp_path: Path) -> None:
    [text] = [text for name, text, _ in examples() if name == "tokenizer"]
    (tmp_path / "my_parts").mkdir()
    (tmp_path / "my_parts" / "tokenizer.py").write_text(text)
    (tmp_path / "plain.json").write_text("{}")
    content = gzip.compress(b"{}" * 100)
    (tmp_path / "cut.gz").write_bytes(content[:-10])
    (tmp_path / "damaged.gz").write_bytes(content[:12] + b"\xff\xff" + content[14:])
    names = ["missing.gz", "plain.json", "cut.gz", "damaged.gz"]
    printed = run_script(READ_TOKENIZER, tmp_path, *(tmp_path / name for name in names))
    missing, *others = printed.splitlines()
    assert missing.endswith("give the path of a gzipped tokenizer.json")
    assert len(others) == 3 and all("is no gzipped tokenizer.json: " in line for line in others)


def test_every_kind_of_part_has_an_example() -> None:
    assert {name for name, _, _ in examples()} == {
        *(
            "router",
            "norm",
            "kernel",
            "optimizer",
            "schedule",
            "callback",
            "guard",
            "tracker",
            "target",
        ),
        *("source", "tokenizer", "cleaning"),
    }
    assert all(len(page.read_text().splitlines()) <= 120 for page in PAGES)
