"""Kinds count from the moment their class is defined, and two of one name are refused."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.paths import ROOT

# Each case runs in a process of its own: a kind stays defined for as long as its process lives.
LATE = """
from typing import ClassVar, Literal
from pretrain.config.load import load_recipe, recipe_to_yaml, parse_yaml, validate_recipe
from pretrain.core.errors import ConfigError
from pretrain.model.moe.routers import SoftmaxTopK
from pretrain.model.config import Norm
from tests.support.paths import ROOT

def error_of(*overrides):
    try:
        load_recipe("debug", list(overrides))
    except ConfigError as error:
        return str(error)

before = error_of("model.moe.router={kind: late}")
class Late(SoftmaxTopK):
    kind: Literal["late"]
    sharpness: float = 2.0
{check}
"""
CHECKS = {
    "a kind defined after the recipe's class is known": (
        """
assert "'late'" in before and "'softmax_topk'" in before, before
recipe = load_recipe("debug", ["model.moe.router={kind: late, sharpness: 3}"])
assert type(recipe.model.moe.router) is Late and recipe.model.moe.router.sharpness == 3
again = validate_recipe(parse_yaml(recipe_to_yaml(recipe), "saved"), "saved")
assert again == recipe and again.model.moe.router.sharpness == 3
"""
    ),
    "its fields are named in errors": (
        """
found = error_of("model.moe.router={kind: late, sharpnes: 3}")
assert "unknown field 'model.moe.router.sharpnes': did you mean 'sharpness'?" in found, found
found = error_of("model.moe.router={kind: latte}")
assert "'model.moe.router.kind' is 'latte'" in found and "'late'" in found, found
"""
    ),
    "two kinds of one name are refused": (
        """
class Other(Norm):
    kind: Literal["rms_norm"] = "rms_norm"
found = error_of()
assert "'rms_norm'" in found and "pretrain.model.config.RMSNormConfig" in found, found
assert "__main__.Other" in found, found
"""
    ),
    "a kernel can do what it states, and no more": (
        """
from pretrain.model.attention.kernels.config import Kernel
class Plain(Kernel):
    kind: Literal["plain", "plain_v2"]
    fp32: ClassVar[bool] = True
    implementation: ClassVar[str] = "pretrain.model.attention.kernels.sdpa:sdpa_attention"
assert error_of("model.attention.kernel=plain_v2") is None
found = error_of("model.attention.kernel=plain_v2", "model.attention.sinks=true")
assert "sinks" in found, found
"""
    ),
    "mup takes only optimizers that say they scale": (
        """
from pretrain.optim.config import SGDConfig
class PlainSgd(SGDConfig):
    kind: Literal["plain_sgd"]
mup = "model.initialization={kind: mup, base: {hidden_size: 16, num_attention_heads: 2, num_key_value_heads: 1, moe_intermediate_size: 16}}"
plain = "optimizer={kind: plain_sgd, learning_rate: 0.1, momentum: 0}"
assert error_of(plain) is None and error_of(mup) is None
assert "optimizer" in error_of(mup, plain)
"""
    ),
    "a second default of a family is refused": (
        """
from pretrain.optim.config import AdamWConfig
class Mine(AdamWConfig):
    kind: Literal["mine"] = "mine"
found = error_of("optimizer.learning_rate=1e-3")
assert "__main__.Mine" in found and "only one of a family" in found, found
"""
    ),
    "reading a recipe imports neither torch nor DeepSpeed": (
        """
import sys
load_recipe("debug")
assert not {"torch", "deepspeed"} & set(sys.modules)
"""
    ),
}


@pytest.mark.parametrize("name", CHECKS)
def test_kinds_count_from_their_definition_on(name: str) -> None:
    script = LATE.replace("{check}", CHECKS[name])
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
