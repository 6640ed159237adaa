"""Numbers about expert usage against their plain definitions, pictures' arrays, and the files of
windows.
"""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.analysis.expert_usage import (
    Counts,
    UsageWindow,
    binned,
    gini,
    hottest,
    layer_usage,
    load_window,
    lorenz_curve,
    normalized_entropy,
    save_window,
    square_grid,
    usage_columns,
    window_steps,
)
from pretrain.core.errors import DataError
from tests.support.paths import ROOT

MILLION = 1 << 20
counts = (
    st.lists(st.integers(0, 10**6), min_size=1, max_size=40)
    .filter(any)
    .map(lambda values: np.array(values, dtype=np.int64))
)


def window(*rows: list[int], step: int = 100) -> UsageWindow:
    return UsageWindow(step, 100, list(range(len(rows))), np.array(rows, dtype=np.int64))


@settings(max_examples=60, deadline=None)
@given(counts)
def test_every_number_is_its_definition(counts_E: Counts) -> None:
    size, mean, values = len(counts_E), counts_E.sum() / len(counts_E), counts_E.tolist()
    usage = layer_usage(3, counts_E, 2.0)
    # Half the mean absolute difference of all pairs, relative to the mean (Gini 1912).
    assert usage.gini == pytest.approx(
        sum(abs(a - b) for a in values for b in values) / (2 * size**2 * mean), abs=1e-9
    )
    shares = [value / sum(values) for value in values if value]
    entropy = (
        -sum(share * math.log(share) for share in shares) / math.log(size) if size > 1 else 1.0
    )
    assert usage.normalized_entropy == pytest.approx(entropy, abs=1e-9)
    assert usage.hot_experts == sum(value > 2.0 * mean for value in values)
    assert usage.unused_share == values.count(0) / size
    assert usage.max_over_mean == pytest.approx(max(values) / mean)
    assert usage.hottest == sorted(range(size), key=lambda expert: (-values[expert], expert))[:10]
    assert usage.hottest_load == pytest.approx([values[expert] / mean for expert in usage.hottest])
    assert usage.layer == 3


@pytest.mark.parametrize("size", [4, 1000, MILLION])
def test_even_use_and_one_expert_alone_are_the_ends_of_the_scale(size: int) -> None:
    even, alone = np.full(size, 10**6), np.zeros(size, dtype=np.int64)
    alone[size // 3] = 10**12
    assert gini(even) == pytest.approx(0.0, abs=1e-9) and normalized_entropy(even) == pytest.approx(
        1.0
    )
    assert gini(alone) == pytest.approx((size - 1) / size, abs=1e-9) and normalized_entropy(
        alone
    ) == pytest.approx(0.0, abs=1e-9)
    assert (
        layer_usage(0, even, 1.5).hot_experts == 0 and layer_usage(0, alone, 1.5).hot_experts == 1
    )
    assert hottest(alone, 1).tolist() == [size // 3]


def test_a_row_has_the_means_over_the_layers() -> None:
    columns = usage_columns(window([1, 1, 1, 1], [4, 0, 0, 0]), hot_factor=3.0)
    assert {name: value for name, value in columns.items() if name != "layers"} == pytest.approx(
        {
            "hot_experts": 0.5,
            "unused_share": 0.375,
            "gini": 0.375,
            "normalized_entropy": 0.5,
            "max_over_mean": 2.5,
        }
    )
    assert [layer["hot_experts"] for layer in columns["layers"]] == [0, 1]
    assert (
        usage_columns(window([1, 1, 1, 1], [4, 0, 0, 0]), hot_factor=4.0)["hot_experts"] == 0
    )  # hot is more than the factor


def test_the_area_below_the_lorenz_curve_is_that_of_gini() -> None:
    counts_E = np.random.default_rng(0).geometric(0.01, 100_000)
    share_of_experts, share_of_choices = lorenz_curve(counts_E)
    assert len(share_of_experts) == 513
    assert (
        share_of_experts[0],
        share_of_choices[0],
        share_of_experts[-1],
        share_of_choices[-1],
    ) == (0.0, 0.0, 1.0, 1.0)
    assert 1 - 2 * np.trapezoid(share_of_choices, share_of_experts) == pytest.approx(
        gini(counts_E), abs=1e-4
    )


def test_a_grid_shows_each_expert_at_its_place_and_no_expert_behind_the_last() -> None:
    grid = square_grid(np.array([3, 0, 1, 2, 4]))
    np.testing.assert_allclose(grid, [[1.5, 0.0, 0.5], [1.0, 2.0, np.nan], [np.nan] * 3])


def test_a_cell_of_a_large_grid_is_the_mean_of_its_block() -> None:
    counts_E = np.random.default_rng(0).integers(0, 9, 100 * 100 - 150)
    folded = np.full((102, 102), np.nan)
    folded[:100, :100] = np.pad(
        counts_E / counts_E.mean(), (0, 150), constant_values=np.nan
    ).reshape(100, 100)
    grid = square_grid(counts_E, max_side=34)
    assert grid.shape == (34, 34)
    for row, column in ((0, 0), (7, 13), (32, 5), (32, 30), (5, 33)):
        np.testing.assert_allclose(
            grid[row, column],
            np.nanmean(folded[3 * row : 3 * row + 3, 3 * column : 3 * column + 3]),
        )
    assert np.isnan(grid[33]).all()


@given(counts)
def test_bins_keep_the_mean(counts_E: Counts) -> None:
    bins = binned(counts_E, 8)
    assert len(bins) == min(8, len(counts_E))
    if len(counts_E) % len(bins) == 0:
        assert bins.mean() == pytest.approx(1.0)


def test_a_million_experts_are_read_as_they_were_written(tmp_path: Path) -> None:
    counts_LE = np.random.default_rng(0).geometric(0.02, (2, MILLION)).astype(np.int64)
    counts_LE[1, 7] = 5 * 10**9
    path = save_window(tmp_path / "usage", UsageWindow(1000, 100, [1, 3], counts_LE))
    assert [found.name for found in path.parent.iterdir()] == ["step_001000.npz"]
    whole = load_window(path)
    assert (whole.step, whole.steps, whole.layers, whole.counts_LE.dtype) == (
        1000,
        100,
        [1, 3],
        np.int64,
    )
    np.testing.assert_array_equal(whole.counts_LE, counts_LE)
    np.testing.assert_array_equal(load_window(path, [3]).counts_LE, counts_LE[1:])


def test_windows_are_in_the_order_of_their_steps(tmp_path: Path) -> None:
    for step in (1_000_000, 999_900, 200):
        save_window(tmp_path, window([1, 2], step=step))
    (tmp_path / "step_000300.npz.partial").touch()
    assert window_steps(tmp_path) == [200, 999_900, 1_000_000]
    assert window_steps(tmp_path / "not there") == []


def test_a_damaged_file_and_one_without_counts_are_told(tmp_path: Path) -> None:
    path = save_window(tmp_path, window([1, 2, 3], [4, 5, 6]))
    whole = path.read_bytes()
    with pytest.raises(DataError, match="no layer 5: its layers of experts are 0, 1"):
        load_window(path, [5])
    torn = tmp_path / "torn.npz"
    for damaged in (
        whole[:-40],
        whole[:100],
        b"",
        b"text",
        whole.replace(b"counts_LE", b"counts_XX"),
    ):
        torn.write_bytes(damaged)
        with pytest.raises(DataError, match="torn.npz holds no expert usage, or is damaged"):
            load_window(torn)
    for rows in ([[0, 0], [1, 2]], [[1, -1], [1, 2]], [[]]):
        counts_LE = np.array(rows)
        np.savez(torn, step=1, steps=1, layers=np.arange(len(rows)), counts_LE=counts_LE)
        with pytest.raises(
            DataError, match="holds no counts of at least one choice for each layer"
        ):
            load_window(torn)
    with pytest.raises(DataError, match="cannot read .*: No such file"):
        load_window(tmp_path / "none.npz")


def test_the_analysis_needs_no_torch() -> None:
    code = "import sys, pretrain.analysis.expert_usage; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
