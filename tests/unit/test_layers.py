"""Imports go one way through the packages, and DeepSpeed is imported in few places only."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.support.paths import ROOT

# From the bottom up: a part imports from itself and from the layers below its own. A schema
# (``config``) belongs to its component, and needs less than the component does: that is why it has
# a layer of its own.
LAYERS: list[set[str]] = [
    {"pretrain.core"},
    {
        "data_pipeline.cleaning.config",
        "data_pipeline.sources.config",
        "data_pipeline.tokenizer.config",
    },
    {"data_pipeline.config"},
    {"data_pipeline.sources", "data_pipeline.tokenizer"},
    {"data_pipeline.cleaning", "data_pipeline.shards"},
    {"data_pipeline.preprocess"},
    {"data_pipeline.loading"},
    {
        "pretrain.model.moe.routers",
        "pretrain.model.attention.kernels.config",
        "pretrain.model.moe.exchange.config",
    },
    {
        "pretrain.model.moe.config",
        "pretrain.model.attention.config",
        "pretrain.model.positions.config",
        "pretrain.model.init_config",
    },
    {"pretrain.model.config"},
    {"pretrain.model", "pretrain.optim"},
    {"pretrain.config"},
    {"pretrain.engine"},
    {"pretrain.checkpoint"},
    {"pretrain.export"},
    {"pretrain.evaluation"},
    {"pretrain.analysis"},
    {"pretrain.merging"},
    {"pretrain.callbacks"},
    {"pretrain.guards"},
    {"pretrain.training"},
    {"pretrain.run"},
    {"pretrain.verification"},
    {"pretrain.train"},
    {"pretrain.sweeps", "pretrain.soak"},
    {"pretrain.__main__"},
]
RANKS = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}
ABOVE_ALL = ("tools", "tests", "launchers", "benchmarks")
# What still goes against the order, and is on its way out.
PENDING = {}
# Files that are copied into an export and import each other there.
TRAVELLING = "pretrain.export.custom."
DEEPSPEED_ALLOWED = (
    "pretrain.engine",
    "pretrain.checkpoint",
    "pretrain.model.moe.dropless",
    "pretrain.model.moe.exchange",
    "pretrain.model.moe.deepspeed_native",
)


def inside(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def part_of(module: str) -> str | None:
    """The narrowest entry of ``LAYERS`` that a dotted name belongs to."""
    return max((part for part in RANKS if inside(module, part)), key=len, default=None)


def imported_names(source: str) -> Iterator[str]:
    """Dotted names of everything a file imports, inside functions too; a relative import starts
    with a dot.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (
                f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names
            )


def violations(module: str, source: str) -> list[str]:
    """Why a file's imports break the order, one sentence each."""
    own, found = part_of(module), []
    for name in imported_names(source):
        other = part_of(name)
        if name.startswith("."):
            if module.startswith(TRAVELLING) and module.endswith("_moe_pretrain"):
                continue
            found.append(f"{module} imports relatively: {name}")
        elif inside(name, "deepspeed") and not any(
            inside(module, allowed) for allowed in DEEPSPEED_ALLOWED
        ):
            found.append(f"{module} imports {name}")
        elif any(inside(name, package) for package in ABOVE_ALL):
            found.append(f"{module} imports {name}, which stands above it")
        elif inside(module, "pretrain.model") and inside(name, "data_pipeline"):
            found.append(f"{module} imports {name}: a model knows nothing of data")
        elif own and other and own != other and RANKS[other] >= RANKS[own]:
            found.append(f"{module} imports {name}, which is not below it")
    return found


def modules() -> dict[str, str]:
    """Source of every file of both packages, by dotted name."""
    paths = [
        path for package in ("pretrain", "data_pipeline") for path in (ROOT / package).rglob("*.py")
    ]
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(
            ".__init__"
        ): path.read_text(encoding="utf-8")
        for path in paths
    }


def test_imports_go_one_way() -> None:
    sources = modules()
    assert len(sources) > 50
    assert [
        sentence
        for module, source in sources.items()
        for sentence in violations(module, source)
        if sentence not in PENDING
    ] == []


def test_every_file_has_a_place_in_the_order() -> None:
    assert [module for module in modules() if part_of(module) is None] == [
        "pretrain",
        "data_pipeline",
    ]


@pytest.mark.parametrize(
    "module,source,named",
    [
        (
            "pretrain.config.rules.sections",
            "from pretrain.engine.precision import resolve",
            "pretrain.engine.precision.resolve",
        ),
        (
            "pretrain.model.decoder",
            "def build():\n    from data_pipeline.loading.batch import Batch",
            "data_pipeline.loading.batch.Batch",
        ),
        ("pretrain.engine.engine", "import pretrain.checkpoint.store", "pretrain.checkpoint.store"),
        (
            "pretrain.checkpoint.store",
            "from pretrain.training import trainer",
            "pretrain.training.trainer",
        ),
        (
            "pretrain.export.writer",
            "from pretrain.evaluation.heldout import perplexity",
            "pretrain.evaluation.heldout.perplexity",
        ),
        (
            "pretrain.evaluation.heldout.heldout",
            "from pretrain.merging.usage import measure",
            "pretrain.merging.usage.measure",
        ),
        ("pretrain.training.trainer", "from pretrain.train import main", "pretrain.train.main"),
        ("pretrain.training.trainer", "import deepspeed.comm as dist", "deepspeed.comm"),
        ("pretrain.model.block", "from deepspeed.moe.layer import MoE", "deepspeed.moe.layer.MoE"),
        ("data_pipeline.preprocess", "from tools.generate import main", "tools.generate.main"),
        ("pretrain.model.block", "from .decoder import DecoderLM", ".decoder.DecoderLM"),
        ("pretrain.export.custom.target", "from .other import Other", ".other.Other"),
        (
            "pretrain.model.moe.routers.mine",
            "from pretrain.model.moe.router import TopKRouter",
            "pretrain.model.moe.router.TopKRouter",
        ),
    ],
)
def test_an_import_against_the_order_is_told(module: str, source: str, named: str) -> None:
    (sentence,) = violations(module, source)
    assert module in sentence and named in sentence


@pytest.mark.parametrize(
    "module,source",
    [
        (
            "pretrain.engine.engine",
            (
                "import deepspeed\nfrom data_pipeline.loading.batch import Batch\nfrom"
                " pretrain.model import decoder"
            ),
        ),
        (
            "pretrain.training.trainer",
            (
                "from pretrain.guards.policy import GuardPolicy\nfrom pretrain.callbacks.base"
                " import Callback"
            ),
        ),
        (
            "pretrain.model.moe.deepspeed_native",
            "from deepspeed.moe.layer import MoE\nfrom pretrain.model.feed_forward import SwiGLU",
        ),
        ("pretrain.model.moe.routers.mine", "from pretrain.core.section import Section"),
        (
            "pretrain.export.custom.modeling_moe_pretrain",
            "from .configuration_moe_pretrain import MoePretrainConfig",
        ),
        ("pretrain.train", "import torch\nfrom pretrain.training.trainer import Trainer"),
    ],
)
def test_imports_along_the_order_are_not_told(module: str, source: str) -> None:
    assert violations(module, source) == []
