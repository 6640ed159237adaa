"""Optimizers that DeepSpeed does not know.

Fact: with ZeRO DeepSpeed refuses optimizers that are not in its list of tested ones, which leaves
    out torch's SGD and all of ours; and with offload it asks for its own CPU Adam.
Versions: 0.19.8 Upstream: none known Effect: trainings with another optimizer than Adam would not
start. Test:
    tests/engine/test_deepspeed_facts.py::test_an_optimizer_that_deepspeed_has_not_tried_is_refused
"""

from __future__ import annotations

ALLOW_ANY_OPTIMIZER = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
