"""The sums of a token's rows, and the parts of the layer that packages compute.

The exchange between ranks is tested on real ones: ``test_expert_exchange.py``.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from pretrain.config.load import load_recipe
from pretrain.core.accelerators import accelerator
from pretrain.core.errors import ConfigError
from pretrain.model.config import SwiGLUConfig
from pretrain.model.decoder import DecoderLM
from pretrain.model.feed_forward import SwiGLU
from pretrain.model.moe.config import DroplessMoEConfig
from pretrain.model.moe.dispatch import Spread, group_rows, spread_rows, sum_rows
from pretrain.model.moe.exchange import base
from pretrain.model.moe.exchange.base import check_parts
from pretrain.model.moe.experts import ExpertForm, experts_loop
from pretrain.run.estimate import Hardware
from pretrain.run.same_run import past_difference
from tests.support.tiny_model import random_tensor, tiny_config, tiny_model

T, D, E = 6, 16, 4
# Rows of six items in some order; the fourth has none.
ITEMS = [2, 0, 5, 2, 1, 2, 4, 0]
MODULE = "pretrain.model.moe.grouped_gemm"


def spread() -> Spread:
    item_R = torch.tensor(ITEMS)
    order_R, _, counts_T = group_rows(item_R, T)
    return Spread(item_R, order_R, counts_T.cumsum(0) - counts_T)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_rows_are_spread_and_summed_as_by_plain_indexing(
    dtype: torch.dtype, tolerance: float
) -> None:
    x_TD, rows_RD = random_tensor(T, D, dtype=dtype), random_tensor(8, D, seed=1, dtype=dtype)
    weights_R1 = random_tensor(8, 1, seed=2)
    given = [x_TD, rows_RD, weights_R1]
    results = []
    for plain in (False, True):
        if plain:
            there = x_TD[torch.tensor(ITEMS)]
            zeros_TD = torch.zeros(T, D)
            weighted = zeros_TD.index_add(0, torch.tensor(ITEMS), rows_RD.float() * weights_R1)
            summed = zeros_TD.index_add(0, torch.tensor(ITEMS), rows_RD.float())
        else:
            there = spread_rows(x_TD, spread())
            weighted = sum_rows(rows_RD, spread(), weights_R1)
            summed = sum_rows(rows_RD, spread())
            assert weighted.dtype == summed.dtype == there.dtype == dtype
        outputs = [there.float(), weighted.float(), summed.float()]
        scalar = sum((one * random_tensor(*one.shape, seed=9)).sum() for one in outputs)
        results.append([*outputs, *torch.autograd.grad(scalar, given)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one.float(), other.float(), atol=tolerance, rtol=tolerance)


def test_an_item_without_rows_is_zero() -> None:
    assert sum_rows(random_tensor(8, D), spread())[3].count_nonzero() == 0


def test_rows_are_joined_by_default_if_that_saves_some_for_certain() -> None:
    config = tiny_config("model.moe.num_experts=8", "model.moe.top_k=4").moe
    assert isinstance(config, DroplessMoEConfig)
    for ep_size, dropout, joined in ((1, 0.0, False), (2, 0.0, True), (4, 0.0, False)):
        assert config.deduplicates(ep_size, dropout) is joined
    assert not config.deduplicates(2, 0.1)
    asked = config.model_copy(update={"deduplicate": True})
    assert asked.deduplicates(8, 0.0)


class Fake:
    """The package grouped_gemm: asserts what it demands, and counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def gmm(
        self, a: torch.Tensor, b: torch.Tensor, batch_sizes: torch.Tensor, trans_b: bool = False
    ) -> torch.Tensor:
        assert a.dtype == b.dtype == torch.bfloat16 and a.is_contiguous() and b.is_contiguous()
        assert batch_sizes.dtype == torch.int64 and batch_sizes.device.type == "cpu" and trans_b
        assert int(batch_sizes.sum()) == len(a) and len(batch_sizes) == len(b)
        self.calls += 1
        parts = a.split(batch_sizes.tolist())
        return torch.cat([part @ matrix.T for part, matrix in zip(parts, b, strict=True)])


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    """The package is installed, and there is an A100."""
    fake = Fake()
    modules = {name: ModuleType(name) for name in ("grouped_gemm", "grouped_gemm.ops")}
    modules["grouped_gemm.ops"].gmm = fake.gmm  # type: ignore[attr-defined]
    for name, module in modules.items():
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(base, "gpu_capability", lambda: (8, 0))
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    yield fake
    sys.modules.pop(MODULE, None)


def test_grouped_gemm_computes_what_the_loop_computes(package: Fake) -> None:
    compute = importlib.import_module(MODULE).experts_grouped_gemm
    form = ExpertForm(SwiGLU, SwiGLUConfig(kind="swiglu"))
    x_RD = random_tensor(20, D, dtype=torch.bfloat16)
    weights = {
        name: random_tensor(E, *shape, seed=seed, dtype=torch.bfloat16)
        for seed, (name, shape) in enumerate(
            {"w1_eXD": (24, D), "w2_eDF": (D, 24), "w3_eXD": (24, D)}.items()
        )
    }
    counts_e = torch.tensor([7, 0, 1, 12])
    results = []
    for function in (experts_loop, compute):
        output_RD = function(x_RD, counts_e, **weights, form=form)
        scalar = (output_RD.float() * random_tensor(20, D, seed=9)).sum()
        results.append([output_RD, *torch.autograd.grad(scalar, [x_RD, *weights.values()])])
    assert package.calls == 3
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=0.1, rtol=2e-2)


def test_a_model_computes_with_it(package: Fake) -> None:
    model = tiny_model("model.moe.expert_kernel=grouped_gemm").to(torch.bfloat16)
    logits = model.logits(torch.arange(8)[None])
    assert package.calls == 3 * len(model.layers) and logits.isfinite().all()


def test_what_a_machine_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    moe = tiny_config("model.moe.expert_kernel=grouped_gemm").moe
    exchanged = tiny_config("model.moe.exchange=deepep", "parallel.ep_size=2").moe
    gemm, deepep = "model.moe.expert_kernel=grouped_gemm", "model.moe.exchange=deepep"
    for section, ep_size, precision, capability, told in (
        (moe, 1, "bf16", None, rf"{gemm} needs a GPU of .* 8\.0 or more, but there is no GPU: use"),
        (moe, 1, "bf16", (7, 5), rf"{gemm} needs .* 8\.0 or more, but this one has 7\.5: use"),
        (moe, 1, "bf16", (8, 0), f"{gemm} needs the package grouped_gemm, which is not installed"),
        (moe, 1, "fp32", (8, 0), f"{gemm} needs train.precision=bf16, not fp32: use --set"),
        (exchanged, 2, "bf16", None, f"{deepep} needs a GPU .* but there is no GPU: use --set"),
        (exchanged, 2, "bf16", (9, 0), f"{deepep} needs the package deep_ep, .*exchange=all_to"),
        (exchanged, 2, "fp16", (9, 0), f"{deepep} needs train.precision=bf16, not fp16"),
    ):
        with pytest.raises(ConfigError, match=told):
            check_parts(section, ep_size, precision, capability)
    # A tool that reads a checkpoint on one rank exchanges nothing.
    check_parts(exchanged, 1, "fp32", None)
    check_parts(None, 2, "fp32", None)
    with pytest.raises(ConfigError, match="there is no GPU"):
        tiny_model("model.moe.expert_kernel=grouped_gemm")


def test_a_plan_for_another_machine_asks_its_gpu_alone() -> None:
    recipe = load_recipe("debug", ["model.moe.exchange=deepep", "parallel.ep_size=2"])
    Hardware(accelerator("H200")).check_experts(recipe.model.moe, 2, "bf16")
    with pytest.raises(ConfigError, match=r"9\.0 or more, but this one has 8\.0"):
        Hardware(accelerator("A100")).check_experts(recipe.model.moe, 2, "bf16")


def test_a_model_of_parts_that_are_not_here_opens_by_those_that_run_anywhere() -> None:
    config = tiny_config("model.moe.expert_kernel=grouped_gemm")
    with pytest.raises(ConfigError, match="grouped_gemm"):
        DecoderLM(config)
    DecoderLM(config.portable())
    for kernel in ("loop", "grouped_mm"):
        assert tiny_config(f"model.moe.expert_kernel={kernel}").portable().moe == (
            tiny_config(f"model.moe.expert_kernel={kernel}").moe
        )


@pytest.mark.parametrize(
    "change",
    ["expert_kernel=loop", "deduplicate=true", "exchange=deepep"],
)
def test_a_run_whose_experts_compute_in_another_way_continues(change: str) -> None:
    before = load_recipe("debug", ["parallel.ep_size=2", f"model.moe.{change}"])
    assert past_difference(load_recipe("debug", ["parallel.ep_size=1"]), before, 10) is None
    other = load_recipe("debug", ["model.moe.top_k=1"])
    assert "top_k" in str(past_difference(other, before, 10))
