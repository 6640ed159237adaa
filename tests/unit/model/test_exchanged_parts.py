"""The exchange between ranks that share a sequence does not import the compiler."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# A new interpreter: pytest's own may have the compiler already.
CODE = """
import sys
import torch
from torch import distributed
from pretrain.model.token_parallel import exchange_parts, mean_of_ranks

store = distributed.FileStore(sys.argv[1], 1)
distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
name = distributed.group.WORLD.group_name
x = torch.arange(6.0).view(1, 6).requires_grad_()
(exchange_parts(x, name) * mean_of_ranks(x, name)).sum().backward()
assert torch.equal(x.grad, 2 * x.detach())
assert not {"torch._dynamo", "sympy"} & set(sys.modules), "the compiler was imported"
distributed.destroy_process_group()
"""


def test_a_first_exchange_imports_no_compiler(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CODE, str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
