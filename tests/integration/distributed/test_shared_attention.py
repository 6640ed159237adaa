"""Attention whose tokens are on two ranks is that of one process, and that of DeepSpeed's own form.

Tests of what DeepSpeed's and torch's own forms refuse fail as soon as they do not: then
docs/sequence_parallelism.md is to be corrected.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.ranks import Results, run_cases

COMPARED: list[dict[str, Any]] = [
    {"name": "grouped", "form": "ours", "key_heads": 2},
    {"name": "one key head", "form": "ours", "key_heads": 1},
    {"name": "documents", "form": "ours", "key_heads": 4, "documents": True},
    {"name": "compiled", "form": "compiled", "key_heads": 2},
    {"name": "compiled documents", "form": "compiled", "key_heads": 1, "documents": True},
    {"name": "deepspeed grouped", "form": "deepspeed", "key_heads": 2},
    {"name": "deepspeed", "form": "deepspeed", "key_heads": 4},
]
# What a form refuses. torch's ring is the last: it leaves functions replaced.
REFUSED = {
    "deepspeed": "AssertionError: Number of key-value heads (1) must be at least the sequence",
    "torch flex": "NotImplementedError: FlexAttention does not support backward on CPU",
    "torch ring": "NotImplementedError: Operator aten._scaled_dot_product_flash_attention_for_cpu",
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    compared = [{"run": "compare", **case} for case in COMPARED]
    refused = [
        {"run": "refusal", "name": f"refused {form}", "form": form, "key_heads": heads}
        for form, heads in zip(REFUSED, (1, 4, 4), strict=True)
    ]
    return run_cases("shared_attention", [*compared, *refused], 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", [case["name"] for case in COMPARED])
def test_outputs_and_gradients_are_those_of_whole_sequences(results: Results, name: str) -> None:
    apart = results[name]["apart"]
    assert len(apart) == 4 and max(apart) < 2e-6


@pytest.mark.parametrize("form", REFUSED)
def test_other_forms_still_lack_what_made_this_project_use_its_own(
    results: Results, form: str
) -> None:
    assert results[f"refused {form}"]["refusal"].startswith(REFUSED[form])
