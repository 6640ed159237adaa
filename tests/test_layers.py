"""Imports go one way through the packages, and DeepSpeed is imported in few places only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the bottom up: a part imports from its own package and from the groups before its own. Two groups are of parts whose files may use each
# other: a recipe's sections, to which the kinds of router belong, and the loop.
LAYERS: list[set[str]] = [
    {"pretrain.config", "pretrain.model.routers"},
    {"pretrain.model", "data_pipeline", "pretrain.optim"},
    {"pretrain.engine"},
    {"pretrain.checkpoint"},
    {"pretrain.export"},
    {"pretrain.evaluation"},
    {"pretrain.merging"},
    {"pretrain.callbacks"},
    {"pretrain.trainer", "pretrain.guards", "pretrain.incidents", "pretrain.supervision", "pretrain.plan", "pretrain.run_folder", "pretrain.signals"},
    {"pretrain.train"},
    {"pretrain.range_test", "pretrain.sweeps"},
]
CLOSE_GROUPS = (LAYERS[0], LAYERS[8])
RANKS = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}
ABOVE_ALL = ("tools", "tests", "launchers", "benchmarks")
# Files that are copied into an export and import each other there.
TRAVELLING = "pretrain.export.custom."
DEEPSPEED_ALLOWED = ("pretrain.engine", "pretrain.checkpoint", "pretrain.model.moe.dropless", "pretrain.model.moe.native")


def inside(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def part_of(module: str) -> str | None:
    """The narrowest entry of ``LAYERS`` that a dotted name belongs to."""
    return max((part for part in RANKS if inside(module, part)), key=len, default=None)


def imported_names(source: str) -> Iterator[str]:
    """Dotted names of everything a file imports, inside functions too; a relative import starts with a dot."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def violations(module: str, source: str) -> list[str]:
    """Why a file's imports break the order, one sentence each."""
    own, found = part_of(module), []
    for name in imported_names(source):
        other = part_of(name)
        if name.startswith("."):
            if module.startswith(TRAVELLING) and module.endswith("_moe_pretrain"):
                continue
            found.append(f"{module} imports relatively: {name}")
        elif inside(name, "deepspeed") and not any(inside(module, allowed) for allowed in DEEPSPEED_ALLOWED):
            found.append(f"{module} imports {name}")
        elif any(inside(name, package) for package in ABOVE_ALL):
            found.append(f"{module} imports {name}, which stands above it")
        elif own and other and own != other and RANKS[other] >= RANKS[own] and not any({own, other} <= group for group in CLOSE_GROUPS):
            found.append(f"{module} imports {name}, which is not below it")
    return found


def modules() -> dict[str, str]:
    """Source of every file of both packages, by dotted name."""
    paths = [path for package in ("pretrain", "data_pipeline") for path in (ROOT / package).rglob("*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path.read_text(encoding="utf-8") for path in paths}


def test_imports_go_one_way() -> None:
    sources = modules()
    assert len(sources) > 50
    assert [sentence for module, source in sources.items() for sentence in violations(module, source)] == []


def test_every_file_has_a_place_in_the_order() -> None:
    assert [module for module in modules() if part_of(module) is None] == ["pretrain"]


@pytest.mark.parametrize(
    "module,source,named",
    [
        ("pretrain.config.rules", "from pretrain.model.sizes import model_size", "pretrain.model.sizes.model_size"),
        ("pretrain.model.decoder", "def build():\n    from data_pipeline.loader import Batch", "data_pipeline.loader.Batch"),
        ("pretrain.engine.engine", "import pretrain.checkpoint.store", "pretrain.checkpoint.store"),
        ("pretrain.checkpoint.store", "from pretrain import trainer", "pretrain.trainer"),
        ("pretrain.export.writer", "from pretrain.evaluation import perplexity", "pretrain.evaluation.perplexity"),
        ("pretrain.evaluation.heldout", "from pretrain.merging.usage import measure", "pretrain.merging.usage.measure"),
        ("pretrain.trainer", "from pretrain.train import main", "pretrain.train.main"),
        ("pretrain.trainer", "import deepspeed.comm as dist", "deepspeed.comm"),
        ("pretrain.model.block", "from deepspeed.moe.layer import MoE", "deepspeed.moe.layer.MoE"),
        ("data_pipeline.build", "from tools.generate import main", "tools.generate.main"),
        ("pretrain.model.block", "from .decoder import DecoderLM", ".decoder.DecoderLM"),
        ("pretrain.export.custom.target", "from .other import Other", ".other.Other"),
        ("pretrain.model.routers.mine", "from pretrain.model.moe.router import TopKRouter", "pretrain.model.moe.router.TopKRouter"),
    ],
)
def test_an_import_against_the_order_is_told(module: str, source: str, named: str) -> None:
    (sentence,) = violations(module, source)
    assert module in sentence and named in sentence


@pytest.mark.parametrize(
    "module,source",
    [
        ("pretrain.engine.engine", "import deepspeed\nfrom data_pipeline.loader import Batch\nfrom pretrain.model import decoder"),
        ("pretrain.trainer", "from pretrain.run_folder import RunFolder\nfrom pretrain.callbacks.base import Callback"),
        ("pretrain.model.moe.native", "from deepspeed.moe.layer import MoE\nfrom pretrain.model.feed_forward import SwiGLU"),
        ("pretrain.model.routers.mine", "from pretrain.config.section import Section"),
        ("pretrain.export.custom.modeling_moe_pretrain", "from .configuration_moe_pretrain import MoePretrainConfig"),
        ("pretrain.train", "import torch\nfrom pretrain.trainer import Trainer"),
    ],
)
def test_imports_along_the_order_are_not_told(module: str, source: str) -> None:
    assert violations(module, source) == []
