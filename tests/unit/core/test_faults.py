"""Faults that the environment asks for happen at their site, pass and rank, and never otherwise."""

from __future__ import annotations

import ast
import errno
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import torch

from pretrain.core import faults
from pretrain.core.errors import ConfigError
from tests.support.paths import ROOT


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    """No fault of one test reaches the next one."""
    yield
    faults.arm({})


def in_a_process(value: str, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    program = "import os\nfrom pretrain.core import faults\nfaults.arm_or_exit(os.environ)\n" + code
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT), "FAULT": value, **environment},
        capture_output=True,
        text=True,
        timeout=30,
    )


PASSES = "for n in range(1, 6):\n    print(n, flush=True)\n    faults.reached('save.rename')"


@pytest.mark.parametrize(("kind", "code"), [("kill", -9), ("exit", 1)])
def test_the_process_dies_at_the_third_pass(kind: str, code: int) -> None:
    done = in_a_process(f"{kind}@save.rename:3", PASSES)
    assert (done.returncode, done.stdout.split()) == (code, ["1", "2", "3"])
    assert f"warning: FAULT={kind}@save.rename:3" in done.stderr


def test_a_stopped_process_waits_and_continues() -> None:
    program = f"import os\nfrom pretrain.core import faults\nfaults.arm(os.environ)\n{PASSES}"
    child = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT), "FAULT": "stop@save.rename:2"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    _, status = os.waitpid(child.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    os.kill(child.pid, 18)  # SIGCONT
    output, _ = child.communicate(timeout=30)
    assert output.split() == ["1", "2", "3", "4", "5"] and child.returncode == 0


@pytest.mark.parametrize(("kind", "number"), [("enospc", errno.ENOSPC), ("eio", errno.EIO)])
def test_errors_of_the_disk_happen_once_or_from_then_on(kind: str, number: int) -> None:
    for onwards, expected in (("", [0, number, 0]), ("+", [0, number, number])):
        faults.arm({"FAULT": f"{kind}@data.read:2{onwards}"})
        seen = []
        for _ in range(3):
            try:
                faults.reached("data.read")
                seen.append(0)
            except OSError as error:
                seen.append(error.errno)
        assert seen == expected


def test_only_the_chosen_rank_and_site_are_hit_and_several_faults_count_alone() -> None:
    asked = "eio@data.read:1:1, enospc@save.sync:2"
    faults.arm({"FAULT": asked, "RANK": "0"})
    for _ in range(3):
        faults.reached("data.read")
    faults.reached("save.sync")
    with pytest.raises(OSError, match="No space left"):
        faults.reached("save.sync")
    faults.arm({"FAULT": asked, "OMPI_COMM_WORLD_RANK": "1"})
    with pytest.raises(OSError, match="save|data.read"):
        faults.reached("data.read")


def test_a_poisoned_loss_and_its_gradient_are_nan_and_others_are_untouched() -> None:
    faults.arm({"FAULT": "nan@step.backward:2"})
    weight = torch.ones(3, requires_grad=True)
    for number in (1, 2, 3):
        weight.grad = None
        loss = faults.poison("step.backward", weight.sum())
        loss.backward()
        assert weight.grad is not None
        assert bool(weight.grad.isnan().all()) == math.isnan(loss.item()) == (number == 2)


def test_a_pause_takes_its_seconds() -> None:
    faults.arm({"FAULT": "slow=0.2@load.begin:1"})
    began = time.monotonic()
    faults.reached("load.begin")
    assert 0.2 <= time.monotonic() - began < 5


@pytest.mark.parametrize(
    "value",
    [
        "kil@save.rename:1",
        "kill@save.renam:1",
        "kill@save.rename",
        "kill@save.rename:0",
        "kill@save.rename:1:x",
        "kill",
        "slow@save.rename:1",
        "kill=2@save.rename:1",
        "nan@save.rename:1",
        "kill@save.rename:1;exit@save.end:1",
    ],
)
def test_a_typing_mistake_is_a_sentence_that_lists_kinds_and_sites(value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        faults.parse(value)
    for name in (*faults.KINDS, *faults.SITES):
        assert name in str(caught.value)


def test_a_typing_mistake_ends_a_command_with_code_2_at_its_start() -> None:
    done = subprocess.run(
        [sys.executable, "tools/inspect_checkpoint.py", "--help"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "FAULT": "kill@save.renam:1"},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 2 and done.stderr.startswith("error: FAULT: 'kill@save.renam:1'")
    assert "Traceback" not in done.stderr and done.stdout == ""


def test_without_faults_a_site_costs_next_to_nothing() -> None:
    reached, passes = faults.reached, 100_000
    began = time.perf_counter()
    for _ in range(passes):
        reached("step.begin")
    # 25 to 60 ns are usual; a busy machine may need several times as long.
    assert (time.perf_counter() - began) / passes < 2e-6


def sites_in_the_code() -> Iterator[tuple[str, str]]:
    """(function, site) of each call in the product."""
    for folder in ("pretrain", "data_pipeline", "tools"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if (
                    isinstance(node, ast.Call)
                    and isinstance(node.func, ast.Attribute)
                    and isinstance(node.func.value, ast.Name)
                    and node.func.value.id == "faults"
                    and node.func.attr in ("reached", "poison")
                ):
                    assert isinstance(node.args[0], ast.Constant), f"{path}:{node.lineno}"
                    yield node.func.attr, str(node.args[0].value)


def test_each_site_in_the_code_is_registered_and_poisons_where_nan_is_allowed() -> None:
    for function, site in sites_in_the_code():
        assert site in faults.SITES
        assert (function == "poison") == (site in faults.TAKES_NAN)
