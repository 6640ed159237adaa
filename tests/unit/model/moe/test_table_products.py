"""Products with chosen rows: the plain ones against a loop, torch's bags and Triton's kernels
against the plain ones.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pretrain.core.errors import ConfigError
from pretrain.model.moe.tables import products_triton as row_products_triton
from pretrain.model.moe.tables.interface import Bags, TableKernel
from pretrain.model.moe.tables.products import BAGS, PLAIN, kernel_named
from pretrain.model.moe.tables.products_triton import TRITON
from tests.support.paths import ROOT, WORKERS
from tests.support.table_product_cases import CHOICES, assert_same, computed, expected, random_case

pytestmark = pytest.mark.filterwarnings(
    "ignore:Sparse CSR tensor support"
)  # pytest forgets the filter of row_products

KERNELS = {"plain": PLAIN, "bags": BAGS}
LENGTHS = st.lists(st.integers(0, 9), max_size=6)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("kernel", KERNELS)
def test_products_and_gradients_equal_a_loop_over_pairs(
    kernel: str, width: int, choice: str
) -> None:
    case = random_case(*CHOICES[choice], D=6, width=width)
    assert_same(computed(case, KERNELS[kernel]), expected(case))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(LENGTHS, st.integers(1, 20), st.integers(1, 40), st.integers(1, 3), st.integers(0, 99))
def test_bags_equal_the_plain_products(
    lengths: list[int], num_rows: int, D: int, width: int, seed: int
) -> None:
    case = random_case(lengths, num_rows, D, width, seed)
    assert_same(computed(case, BAGS), computed(case, PLAIN))


def wrong_rows(c_P: torch.Tensor, table_ND: torch.Tensor, bags: Bags) -> torch.Tensor:
    return PLAIN.weighted_rows(c_P, table_ND, Bags(bags.row_P.roll(1), bags.offsets_T1))


def each_row_once(c_P: torch.Tensor, table_ND: torch.Tensor, bags: Bags) -> torch.Tensor:
    pairs = list(zip(bags.owners().tolist(), bags.row_P.tolist(), strict=True))
    is_first_P = torch.tensor([pair not in pairs[:number] for number, pair in enumerate(pairs)])
    return PLAIN.weighted_rows(c_P * is_first_P, table_ND, bags)


@pytest.mark.parametrize("broken", [wrong_rows, each_row_once])
def test_a_kernel_that_sums_other_rows_is_noticed(
    broken: Callable[[torch.Tensor, torch.Tensor, Bags], torch.Tensor],
) -> None:
    case = random_case(*CHOICES["duplicates"], D=6)
    with pytest.raises(AssertionError, match="weighted"):
        assert_same(computed(case, TableKernel(PLAIN.row_dots, broken)), expected(case))


def test_dots_with_the_tokens_of_other_bags_are_noticed() -> None:
    def neighbours(x_TD: torch.Tensor, table_ND: torch.Tensor, bags: Bags) -> torch.Tensor:
        return PLAIN.row_dots(x_TD.roll(1, dims=0), table_ND, bags)

    case = random_case(*CHOICES["ordinary"], D=6)
    with pytest.raises(AssertionError, match="dots"):
        assert_same(computed(case, TableKernel(neighbours, PLAIN.weighted_rows)), expected(case))


def test_triton_kernels_equal_the_plain_products() -> None:
    """In a process of its own: whether Triton interprets is decided when it is imported, and other
    tests import it.
    """
    interpret = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        str(WORKERS / "triton_table_products.py"),
    ]
    finished = subprocess.run(
        command,
        env=os.environ | interpret,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr


@triton.jit
def atomic_kernel(total: tl.tensor, x_P: tl.tensor, PAIRS: tl.constexpr) -> None:
    tl.atomic_add(total, tl.sum(tl.load(x_P + tl.arange(0, PAIRS))))


FLOATS, INTS, NUMBER = "*fp32", "*i64", "i32"
SHAPES = {"D": 768, "PAIRS": 8, "COLUMNS": 512}
COMPILED = {
    "dots": (row_products_triton._dot_kernel, [FLOATS] * 3 + [INTS] * 2 + [NUMBER], SHAPES),
    "pieces": (
        row_products_triton._piece_kernel,
        [FLOATS] * 4 + [INTS] * 4 + [NUMBER],
        SHAPES | {"PIECE": row_products_triton.PIECE},
    ),
    "join": (
        row_products_triton._join_kernel,
        [FLOATS] * 2 + [INTS] * 2,
        {"D": 768, "PIECES": 8, "COLUMNS": 512},
    ),
    "atomic": (atomic_kernel, [FLOATS] * 2, {"PAIRS": 8}),
}


@pytest.mark.parametrize("kernel", COMPILED)
def test_kernels_compile_for_a_gpu_and_add_nothing_atomically(
    kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter takes much that the compiler refuses.

    The kernel with an atomic addition shows that one would be seen.
    """
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function, types, constants = COMPILED[kernel]
    signature = dict(zip(function.arg_names, types, strict=False)) | dict.fromkeys(
        constants, "constexpr"
    )
    compiled = triton.compile(
        ASTSource(function, signature, constants), target=GPUTarget("cuda", 90, 32)
    )
    assert bool(re.search(r"\b(atom|red)\.", compiled.asm["ptx"])) == (kernel == "atomic")


def test_triton_is_refused_where_the_model_runs_on_a_cpu() -> None:
    case = random_case(*CHOICES["ordinary"], D=6)
    for call in (
        lambda: computed(case, TRITON),
        lambda: TRITON.weighted_rows(case.c_PX.flatten(), case.table_NXD.flatten(0, 1), case.bags),
    ):
        with pytest.raises(ConfigError, match="needs CUDA, but the model runs on cpu"):
            call()


def test_a_missing_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "pretrain.model.moe.tables.products_triton")
    with pytest.raises(ConfigError, match="package triton.*not installed"):
        kernel_named("auto", torch.device("cuda"))


def test_kernels_are_found_by_name() -> None:
    cpu = torch.device("cpu")
    assert [kernel_named(name, cpu) for name in ("plain", "bags", "auto", "triton")] == [
        PLAIN,
        BAGS,
        BAGS,
        TRITON,
    ]
    assert kernel_named("auto", torch.device("cuda")) is TRITON
