"""A step that spares DeepSpeed's copies of gradients is the same step, to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.ranks import Results, run_cases
from tests.support.training_cases import ADAMW, SGD, case

# Stage, precision, and the format in which gradients are summed if it is another one.
FORMS = [(1, "fp32", None), (1, "bf16", None), (2, "fp32", None), (2, "bf16", None)]
FORMS += [(2, "bf16", "fp32")]
NUMBERS = ("nll", "loss", "grad_norm", "validation", "changes")


def results(ranks: int, folder: Path) -> tuple[Results, Results]:
    """What is trained with the copies of DeepSpeed, and without them."""
    cases = [
        case(
            "dropless",
            stage,
            ranks,
            ADAMW if stage == 1 else SGD,
            (f"train.precision={precision}",),
            changes=True,
            all_copies=copies,
            sections={"data_types": {"grad_accum_dtype": summed}} if summed else {},
        )
        for stage, precision, summed in FORMS
        for copies in (True, False)
    ]
    found = run_cases("training_steps", cases, ranks, folder)
    rows = [found[entry["name"]] for entry in cases]
    names = list(map(str, FORMS))
    return dict(zip(names, rows[::2], strict=True)), dict(zip(names, rows[1::2], strict=True))


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_number_is_the_same(ranks: int, tmp_path: Path) -> None:
    with_copies, without = results(ranks, tmp_path)
    assert len(with_copies) == len(FORMS)
    for name, expected in with_copies.items():
        found = {key: without[name][key] for key in NUMBERS}
        assert min(found["grad_norm"]) > 0
        assert found == {key: expected[key] for key in NUMBERS}, name
