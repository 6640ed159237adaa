"""Freed memory is kept: the tensors of later steps take hardly any page faults."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import random, resource, sys, torch
from pretrain.engine.cpu_tuning import tune_for_training
if sys.argv[1] == "tuned":
    tune_for_training()
random.seed(0)
def steps(number):
    for _ in range(number):
        # 4 to 80 MB: glibc maps those above 32 MB by themselves.
        tensors = [torch.ones(random.choice([1, 5, 9, 14, 20]) * 10**6) for _ in range(4)]
        [tensor * 2 for tensor in tensors]
steps(150)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
steps(30)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_tensors_of_every_step_are_not_mapped_anew() -> None:
    faults = {
        side: int(
            subprocess.run(
                [sys.executable, "-c", FAULTS, side], check=True, capture_output=True, text=True
            ).stdout.splitlines()[-1]
        )
        for side in ("plain", "tuned")
    }
    assert 20 * faults["tuned"] < faults["plain"], faults
