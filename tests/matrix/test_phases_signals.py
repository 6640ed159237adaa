"""A run of three phases over two ranks that gets SIGTERM and SIGKILL in each of them."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from pretrain.core.errors import PEER_LOST, PREEMPTED
from pretrain.engine.topology import free_port
from tests.support.tiny_run import SCRIPT, Started, Tiny, curve, wait_for_step

# 16 steps of 128 tokens, 16 and 16 of 256.
WARM = "{name: warm, tokens: 2048, global_batch_size: 4}"
LONG = (
    "{name: long, tokens: 4096, sequence_length: 64, global_batch_size: 4, micro_batch_size: 1,"
    " position: {rope_theta: 500}}"
)
ANNEAL = (
    "{name: anneal, mixture: {kind: weights, weights: {one: 1, two: 3}}, frozen: [router],"
    " schedule: {kind: sqrt}}"
)


def arguments_for(tiny: Tiny, run: Path) -> list[str]:
    datasets = f"data.corpora={{one: {tiny.data}, two: {tiny.data}}}"
    settings = [
        "data.path=null",
        datasets,
        f"phases=[{WARM}, {LONG}, {ANNEAL}]",
        "train.train_tokens=10240",
        "parallel.ep_size=2",
    ]
    return tiny.arguments(
        run, *settings, "checkpoint.interval_steps=4", "validation.interval_steps=8"
    )


def start(tiny: Tiny, run: Path) -> list[Started]:
    """Two ranks from nothing but their environment, so that nobody ends the one when the other
    dies.
    """
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command: list[str | Path] = [sys.executable, SCRIPT, *arguments_for(tiny, run)]
    return [
        Started(command, run.parent, shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]


def finish(ranks: list[Started]) -> list[int]:
    return [rank.wait() for rank in ranks]


def saved_step(run: Path) -> int:
    return int((run / "checkpoints" / "latest").read_text().removeprefix("step_"))


@pytest.mark.full
def test_signals_in_every_phase_of_a_run_over_two_ranks_leave_its_end_bitwise_the_same(
    tiny: Tiny, tmp_path: Path
) -> None:
    whole, run = tmp_path / "whole" / "run", tmp_path / "cut" / "run"
    whole.parent.mkdir()
    run.parent.mkdir()
    assert finish(start(tiny, whole)) == [0, 0]
    phases = {row["step"]: row["phase"] for row in curve(whole)}
    assert max(phases) == 48
    hit: dict[str, list[str]] = {}
    for step in (3, 18, 34):
        ranks = start(tiny, run)
        wait_for_step(run, step, ranks[0])
        ranks[1].process.send_signal(signal.SIGTERM)
        assert finish(ranks) == [PREEMPTED, PREEMPTED]
        hit.setdefault("SIGTERM", []).append(phases[saved_step(run)])

        survivor, victim = start(tiny, run)
        wait_for_step(run, saved_step(run) + 3, survivor)
        victim.process.kill()
        assert survivor.wait() == PEER_LOST, survivor.stderr
        victim.wait()
        last = curve(run)[-1]["step"]
        hit.setdefault("SIGKILL", []).append(phases[last])
    assert hit == {"SIGTERM": ["warm", "long", "anneal"], "SIGKILL": ["warm", "long", "anneal"]}
    assert finish(start(tiny, run)) == [0, 0]
    assert curve(run) == curve(whole)
    ends = [
        sorted((folder / "checkpoints" / "step_48").glob("weights-*.safetensors"))
        for folder in (run, whole)
    ]
    assert [path.read_bytes() for path in ends[0]] == [
        path.read_bytes() for path in ends[1]
    ] and len(ends[0]) == 3
