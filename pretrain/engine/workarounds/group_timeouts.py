"""How long a collective may wait for a rank that is alive.

Fact: DeepSpeed makes its groups without a timeout of their own, and passes none to its barriers:
    they get torch's, 30 minutes with gloo and 10 with NCCL.
Versions: 0.19.8
Upstream: none known
Effect: ranks that wait while one packs a large corpus, writes a large checkpoint or waits for slow
    storage would end after that time. The watchdog decides instead, which knows what each rank
    does.
Test:
    tests/integration/engine/test_deepspeed_facts.py::test_groups_of_deepspeed_have_the_timeout_of_torch
"""

from __future__ import annotations

from datetime import timedelta

from torch.distributed import distributed_c10d

# A week: longer than any pause, and not so long that a library's clock overflows.
LONG = timedelta(days=7)


def wait_long_in_all_groups() -> None:
    """Let collectives of all groups that exist wait for a week."""
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(LONG, group)
