"""A rank's memory rises by its share and two tensors while a model is built, not by the model."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from pretrain.config.load import load_recipe
from pretrain.model.decoder import DecoderLM
from pretrain.model.sizes import model_size
from pretrain.run.memory import start_bytes_per_rank, state_bytes_per_rank
from tests.support.ranks import Case, run_cases

# 53 million parameters: 211 MB in fp32, 106 MB in bf16; the largest one, of 8 experts, has 2.1
# million.
MODEL = [
    "model.hidden_size=512", "model.num_hidden_layers=7",
    "model.attention={kind: gqa, num_attention_heads: 8, num_key_value_heads: 8, head_dim: 64}",
    "model.moe={kind: dropless, num_experts: 8, top_k: 2, moe_intermediate_size: 512}",
    "model.layer_pattern={kind: all_moe}",
    # These alone also make the small engine that warms the process up.
    "model.vocab_size=1024", "train.global_batch_size=2", "train.micro_batch_size=1",
]  # fmt: skip
RANKS = 2
# Pages of allocators, of threads and of what is loaded late.
SLACK = 12e6


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    folder = tmp_path_factory.mktemp("start_memory")
    with torch.device("meta"):
        shaped = DecoderLM(load_recipe("debug", MODEL).model).state_dict()
    file = folder / "weights.safetensors"
    save_file({name: torch.zeros(tensor.shape) for name, tensor in shaped.items()}, file)
    (folder / "resumed").mkdir()
    settings = [*MODEL[:-3], "train.precision=bf16", *MODEL[-3:]]

    def case(name: str, zero: int, **extra: object) -> Case:
        return {"name": name, "zero": zero, "overrides": settings, **extra}

    cases = [
        case("random", 3, folder=str(folder / "resumed")),
        case("from a file", 3, file=str(file)),
        case("stage 1", 1),
        case("plain", 3, plain=True),
    ]
    return run_cases("start_memory", cases, RANKS, folder)


def peak(result: dict[str, object], part: str) -> int:
    return max(rank[part] for rank in result["ranks"])


def two_tensors(result: dict[str, object]) -> float:
    """One parameter whole in bf16, and one as it is drawn or read, in fp32."""
    return result["largest"] * (2 + 4)


@pytest.mark.parametrize("name", ["random", "from a file"])
def test_at_stage_3_a_rank_holds_its_share_and_two_tensors(
    results: dict[str, dict[str, object]], name: str
) -> None:
    result = results[name]
    share = 2 * result["parameters"] / RANKS
    assert peak(result, "built") < share + two_tensors(result) + SLACK


def test_the_whole_model_would_be_noticed(results: dict[str, dict[str, object]]) -> None:
    plain = results["plain"]
    share = 2 * plain["parameters"] / RANKS
    assert peak(plain, "built") > 2 * (share + two_tensors(plain) + SLACK)
    assert peak(plain, "start") > peak(results["random"], "start")


def test_below_stage_3_a_rank_holds_its_weights_in_bf16(
    results: dict[str, dict[str, object]],
) -> None:
    result = results["stage 1"]
    assert peak(result, "built") < 2 * result["parameters"] + two_tensors(result) + SLACK


@pytest.mark.parametrize(("name", "zero"), [("random", 3), ("stage 1", 1)])
def test_the_start_takes_what_the_dry_run_says(
    results: dict[str, dict[str, object]], name: str, zero: int
) -> None:
    recipe = load_recipe("debug", MODEL)
    size = model_size(recipe.model, recipe.train.sequence_length)
    place = ("bf16", zero, RANKS, 1)
    state = state_bytes_per_rank(size, *place, recipe.optimizer)
    predicted = max(start_bytes_per_rank(size, state, *place).values())
    assert 0.7 * predicted < peak(results[name], "start") < predicted + SLACK


def test_a_resumed_rank_reads_its_own_part(results: dict[str, dict[str, object]]) -> None:
    result = results["random"]
    assert peak(result, "resume") < two_tensors(result) + SLACK
