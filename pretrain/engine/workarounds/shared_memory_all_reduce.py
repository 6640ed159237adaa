"""The all-reduce of CPU ranks through shared memory.

Fact: ``deepspeed.init_distributed`` compiles a shared-memory all-reduce for CPUs. It needs a C++
    compiler, and ranks that wait in it for a dead peer spin for ever.
Versions: 0.19.8
Upstream: none known
Effect: a training on CPUs whose peer is killed would hang; gloo reports a lost connection, and the
    run ends with exit code 7.
Test:
    tests/integration/engine/test_deepspeed_facts.py::test_the_shared_memory_all_reduce_is_still_offered
"""

from __future__ import annotations

import deepspeed


def avoid_shared_memory_all_reduce() -> None:
    """Make DeepSpeed believe that the operation cannot be built.

    To be called before ``init_distributed``, which compiles it.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
