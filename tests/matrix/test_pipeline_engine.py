"""What DeepSpeed's pipelines can do with our blocks: the facts of docs/pipeline_parallelism.md.

The product has no pipeline parallelism. If one of these tests fails after an update of DeepSpeed,
that page and the rule about ``pipeline`` in a ds_config are to be looked at again.
"""

from __future__ import annotations

import pytest

from tests.support.ranks import Case, Results, run_cases

pytestmark = pytest.mark.full


def case(name: str, stages: int, ep_size: int = 1, zero: int = 1, **extra: bool) -> Case:
    return {"name": name, "stages": stages, "ep_size": ep_size, "zero": zero, **extra}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Results:
    cases = [
        case("stages", 2),
        case("carried", 2, carried=True),
        case("replicas", 1, ep_size=2),
        case("DeepSpeed's groups", 2, own_groups=False),
        case("ZeRO 2", 2, zero=2),
    ]
    return run_cases("pipeline_engine", cases, 2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Results:
    cases = [case("stages", 2), case("experts", 2, ep_size=2)]
    return run_cases("pipeline_engine", cases, 4, tmp_path_factory.mktemp("four"))


@pytest.mark.parametrize(
    ("ranks", "name"),
    [("two", "stages"), ("two", "replicas"), ("four", "stages"), ("four", "experts")],
)
def test_a_pipeline_with_dropless_experts_trains_as_one_process(
    ranks: str, name: str, request: pytest.FixtureRequest
) -> None:
    result = request.getfixturevalue(ranks)[name]
    for step, reference in zip(result["curve"], result["plain"], strict=True):
        assert step == pytest.approx(reference, rel=1e-6)


def test_a_router_loss_that_travels_doubles_the_backward_passes_of_a_stage(two: Results) -> None:
    assert two["stages"]["passes"] == 2
    assert two["carried"]["passes"] == 1
    # The gradients are the same, the loss that is reported lacks the router's.
    for step, reference in zip(two["carried"]["curve"], two["stages"]["curve"], strict=True):
        assert step[1] == pytest.approx(reference[1], rel=1e-5)
        assert step[0] < reference[0] - 0.1


def test_deepspeed_takes_stages_for_tensor_parallel_ranks(two: Results) -> None:
    broken = two["DeepSpeed's groups"]
    assert broken["error"].startswith("TypeError") and "groups.py" in broken["places"]


def test_deepspeed_refuses_zero_2_and_steps_that_are_driven_from_outside(two: Results) -> None:
    assert two["ZeRO 2"]["error"] == (
        "AssertionError: ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism"
    )
    assert two["stages"]["forward"] == (
        "PipelineError: Only train_batch() is accessible in pipeline mode."
    )
