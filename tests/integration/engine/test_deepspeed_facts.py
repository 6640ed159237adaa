"""What DeepSpeed does that the engine works around: a test here that fails means that a workaround
can go.

No test uses our engine. See ``pretrain/engine/workarounds``.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

WORKAROUNDS = ROOT / "pretrain" / "engine" / "workarounds"
ENTRIES = ("Fact", "Versions", "Upstream", "Effect", "Test")
FILES = sorted(path for path in WORKAROUNDS.glob("*.py") if path.name != "__init__.py")
PRELUDE = """
import os, torch, deepspeed
from torch import nn
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
def start(stage, optimizer=torch.optim.AdamW, batch=4, **sections):
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    config = {"train_batch_size": batch, "train_micro_batch_size_per_gpu": 2} | sections
    config["zero_optimization"] = {"stage": stage}
    built = optimizer(model.parameters(), lr=0.0)
    return deepspeed.initialize(model=model, optimizer=built, config=config)
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    """Runs code against DeepSpeed in a new process, because a process group lasts as long."""
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    port = {"MASTER_PORT": "0", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + code],
        env=os.environ | rank | port,
        text=True,
        capture_output=True,
        check=False,
    )


def passes(code: str) -> None:
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_stage_0_in_low_precision_takes_a_step_when_it_starts() -> None:
    passes("""
_, optimizer, _, _ = start(0, bf16={"enabled": True})
states = optimizer.state.values()
assert states and all(int(state["step"]) == 1 for state in states)
""")


def test_stage_0_does_not_scale_an_fp16_loss() -> None:
    from deepspeed.accelerator import get_accelerator

    if not get_accelerator().is_fp16_supported():
        pytest.skip("this device does not compute in fp16")
    passes("""
engine, optimizer, _, _ = start(0, batch=2, fp16={"enabled": True, "loss_scale": 64.0})
assert not hasattr(optimizer, "loss_scaler") and optimizer.loss_scale_config.cur_scale == 64.0
inputs = torch.ones(2, 4, dtype=torch.float16, device=engine.device)
engine.backward(engine(inputs).sum())
assert float(engine.module.weight.grad.max()) == 2.0
""")


def test_stage_0_has_no_public_way_to_master_weights() -> None:
    passes("""
from deepspeed.utils import safe_get_full_fp32_param
engine, optimizer, _, _ = start(0, bf16={"enabled": True})
assert safe_get_full_fp32_param(engine.module.weight) is None
assert optimizer.fp32_groups[0][0].dtype == torch.float32
""")


def test_the_shared_memory_all_reduce_is_still_offered() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            'import deepspeed; assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__',
        ],
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_groups_of_deepspeed_have_the_timeout_of_torch() -> None:
    passes("""
from datetime import timedelta
group = deepspeed.comm.new_group([0])
assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(minutes=30)
""")


def test_the_import_of_muon_brings_the_compiler() -> None:
    passes("""
import sys
start(1)
assert "torch._inductor" in sys.modules
""")


@pytest.mark.parametrize("kind", ["Adam", "AdamW", "SGD"])
def test_optimizers_of_torch_bring_the_compiler(kind: str) -> None:
    passes(f"""
import inspect, sys
optimizer = torch.optim.{kind}([nn.Parameter(torch.ones(1))])
assert "torch._dynamo" in sys.modules
step = type(optimizer).step.__wrapped__
assert "_dynamo" in inspect.getsource(step.__code__) and step.__wrapped__ is not None
""")


def test_a_new_batch_size_leaves_the_count_of_micro_batches() -> None:
    passes("""
engine, optimizer, _, _ = start(1)
for _ in range(2):
    engine.backward(engine(torch.ones(2, 4)).sum())
    engine.step()
assert engine.micro_steps == 2 and engine.global_steps == 1
engine.set_train_batch_size(6)
assert engine.gradient_accumulation_steps() == 3
assert engine.micro_steps == 2  # of which 2 % 3 are counted for the next step
assert optimizer.gradient_accumulation_steps == 2
""")


def test_one_rank_copies_each_gradient() -> None:
    passes("""
engine, optimizer, _, _ = start(1, batch=2, bf16={"enabled": True})
copied, copy = [], optimizer.copy_grads_in_partition
optimizer.copy_grads_in_partition = lambda *given: (copied.append(given[0].shape), copy(*given))
engine.backward(engine(torch.ones(2, 4, dtype=torch.bfloat16, device=engine.device)).sum())
assert copied == [(4, 4), (4,)]  # out of the bucket, which each one was copied into
assert optimizer.averaged_gradients[0][0].dtype == torch.bfloat16  # joined, then cast to fp32
""")


def test_an_optimizer_that_deepspeed_has_not_tried_is_refused() -> None:
    done = run("start(1, optimizer=torch.optim.SGD)")
    assert done.returncode != 0 and "untested ZeRO Optimizer" in done.stderr


def test_experts_that_zero_init_partitions_are_spread_over_all_ranks() -> None:
    passes("""
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.module_inject.auto_ep_presets.base import AutoEPConfig
from pretrain.config.load import load_recipe
from pretrain.model.moe.dropless import _layer_spec, _WeightShapes
moe = load_recipe("debug", ["model.moe.num_experts=4"]).model.moe
config = AutoEPConfig()
config.use_grouped_mm = False
source = _WeightShapes(moe, 8, 16)
config_dict = {"train_batch_size": 1, "zero_optimization": {"stage": 3}}
with deepspeed.zero.Init(config_dict_or_path=config_dict, dtype=torch.float32):
    layer = AutoEPMoELayer(_layer_spec(moe, 8, 16), source, 1, 0, config)
experts = list(layer.experts.parameters())
assert len(experts) == 3
for expert in experts:
    assert expert.ds_zero_partition_group_name == "ep_size_1"
    assert expert.ds_process_group is torch.distributed.group.WORLD
""")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_workaround_begins_with_the_same_entries(path: Path) -> None:
    head = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    found = re.findall(r"^(\w+):(?= |$)", head, re.MULTILINE)
    assert tuple(found) == ENTRIES
    test = head.partition("\nTest:")[2].split()[0]
    file, _, name = test.partition("::")
    source = (ROOT / file).read_text(encoding="utf-8")
    assert not name or f"def {name}(" in source
