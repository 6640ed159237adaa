"""The projection counts what the model counts, and fused kernels never move more."""

from __future__ import annotations

import projection
import pytest

from pretrain.model.sizes import model_size


@pytest.mark.parametrize("model", ["moe_1b", "coarse", "fine"])
@pytest.mark.parametrize("fused", [False, True])
def test_model_flops_are_those_of_the_model(model: str, fused: bool) -> None:
    config = projection.recipe_of(model).model
    size = model_size(config, projection.LENGTH)
    operations = projection.micro_batch(config, size.parameters_stored, projection.TOKENS, fused)
    counted = sum(one.flops if one.model_flops is None else one.model_flops for one in operations)
    assert counted == pytest.approx(size.flops_per_token * projection.TOKENS, rel=1e-3)


@pytest.mark.parametrize("model", ["moe_1b", "coarse", "fine"])
def test_fused_kernels_move_less_in_fewer_launches(model: str) -> None:
    plain, fused = (projection.project(model, is_fused) for is_fused in (False, True))
    assert fused.layer_bytes < plain.layer_bytes and fused.step_bytes < plain.step_bytes
    assert fused.layer_kernels < plain.layer_kernels and fused.step_kernels < plain.step_kernels
    # A faster rate of products is a higher MFU, and none is above the rate itself.
    for found in (plain, fused):
        assert 0 < found.mfu[0] < found.mfu[1] < max(projection.SHARES)


def test_an_operation_takes_its_slower_side() -> None:
    launch = projection.LAUNCH_SECONDS
    of_bytes = projection.moved("copy", projection.MEMORY_RATE, 3)
    assert of_bytes.seconds(1.0) == pytest.approx(1.0 + 3 * launch)
    of_flops = projection.Operation("product", projection.LARGEST_PRODUCTS, 1.0)
    assert of_flops.seconds(0.5) == pytest.approx(2.0 + launch)
