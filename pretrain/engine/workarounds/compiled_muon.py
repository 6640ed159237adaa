"""DeepSpeed's Muon, which brings torch's compiler into every start.

Fact: when ZeRO's optimizer is built, DeepSpeed imports its own Muon, whose functions are decorated
    with torch.compile; the decorator imports torch._dynamo and torch._inductor.
Versions: 0.19.8
Upstream: none known
Effect: each rank would spend seconds of processor time at its start on a compiler that it does not
    use: our Muon (pretrain/optim/muon.py) is another one.
Test: tests/integration/engine/test_deepspeed_facts.py::test_the_import_of_muon_brings_the_compiler
"""

from __future__ import annotations

import importlib

from deepspeed.runtime import compiler


def import_muon_without_compiler() -> None:
    """Import DeepSpeed's Muon once, with its functions left as they are written."""
    compile_of_deepspeed = compiler.compile
    compiler.compile = lambda: compiler.dummy_decorator
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        compiler.compile = compile_of_deepspeed
