"""Muon orthogonalises each hidden matrix and each expert by itself, wherever ZeRO has cut them, and
leaves the rest to AdamW.
"""

from __future__ import annotations

import weakref
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pretrain.optim.matrix_shards
import pretrain.optim.muon
from pretrain.config.load import load_recipe
from pretrain.model.decoder import DecoderLM
from pretrain.optim.config import MuonConfig
from pretrain.optim.matrix_shards import MatrixShards, choose_owners, cut_matrices
from pretrain.optim.muon import Muon, orthogonalize
from pretrain.optim.param_groups import is_hidden_matrix, parameter_groups

CONFIG = MuonConfig(kind="muon", learning_rate=0.02, weight_decay=0.1)
CPU = torch.device("cpu")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def optimizer_of(parameter: torch.nn.Parameter, rule: str = "muon", **changes: Any) -> Muon:
    config = CONFIG.model_copy(update=changes)
    return Muon(
        [
            {
                "params": [parameter],
                "rule": rule,
                "lr": config.learning_rate,
                "weight_decay": config.weight_decay,
            }
        ],
        config,
    )


def trained(
    start: torch.Tensor, optimizer: Any, parameter: torch.nn.Parameter, steps: int = 4
) -> torch.Tensor:
    for step in range(steps):
        parameter.grad = random(*start.shape, seed=100 + step)
        optimizer.step()
    return parameter.detach() - start


@pytest.mark.parametrize("shape", [(1, 24, 24), (3, 16, 48), (2, 48, 16)])
def test_the_orthogonalised_matrix_has_the_singular_vectors_of_the_matrix_and_values_near_one(
    shape: tuple[int, int, int],
) -> None:
    matrix_NAB = random(*shape)
    left, _, right = torch.linalg.svd(matrix_NAB, full_matrices=False)
    found = left.mT @ orthogonalize(matrix_NAB, 5) @ right.mT
    values = found.diagonal(dim1=-2, dim2=-1)
    assert values.min() > 0.6 and values.max() < 1.3
    assert (found - torch.diag_embed(values)).abs().max() < 1e-3
    assert torch.linalg.svdvals(matrix_NAB).max() > 3  # it did something


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(16, 48), (48, 16)])
def test_one_matrix_is_trained_as_by_torchs_muon(shape: tuple[int, int], nesterov: bool) -> None:
    """torch iterates in bf16."""
    start = random(*shape)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    reference = torch.optim.Muon(
        [theirs], lr=0.02, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn="match_rms_adamw"
    )
    expected = trained(start, reference, theirs)
    found = trained(
        start, optimizer_of(ours, newton_schulz_precision="bf16", nesterov=nesterov), ours
    )
    assert (found - expected).norm() < 0.01 * expected.norm()
    exact = torch.nn.Parameter(start.clone())
    assert (
        trained(start, optimizer_of(exact, nesterov=nesterov), exact) - expected
    ).norm() < 0.05 * expected.norm()
    other = torch.nn.Parameter(start.clone())
    assert (
        trained(start, optimizer_of(other, nesterov=not nesterov), other) - expected
    ).norm() > 0.05 * expected.norm()


def test_each_expert_of_a_stack_is_trained_by_itself() -> None:
    start = random(3, 8, 12)
    stack = torch.nn.Parameter(start.clone())
    together = trained(start, optimizer_of(stack), stack, steps=1)
    for expert in range(3):
        single = torch.nn.Parameter(start[expert].clone())
        optimizer = optimizer_of(single)
        single.grad = random(3, 8, 12, seed=100)[expert]
        optimizer.step()
        torch.testing.assert_close(
            together[expert], single.detach() - start[expert], rtol=1e-5, atol=1e-6
        )
    flat = torch.nn.Parameter(start.reshape(24, 12).clone())
    flat.grad = random(3, 8, 12, seed=100).reshape(24, 12)
    optimizer_of(flat).step()
    assert (
        flat.detach().view(3, 8, 12) - start - together
    ).abs().max() > 0.1 * together.abs().max()


@pytest.mark.parametrize("flat", [False, True])
def test_an_expert_that_gets_no_tokens_any_more_stays_but_for_its_decay(flat: bool) -> None:
    stack = torch.nn.Parameter(random(3, 8, 8).flatten() if flat else random(3, 8, 8))
    optimizer = optimizer_of(stack)
    if flat:
        optimizer.shards[stack] = MatrixShards(
            cut_matrices(
                torch.Size((3, 8, 8)), start=0, partition_size=192, ranks=1, rank=0, offset=0
            ),
            None,
            CPU,
        )
    trained(stack.detach().clone(), optimizer, stack)
    before = stack.detach().clone().view(3, 8, 8)
    gradient = random(3, 8, 8, seed=1)
    gradient[1] = 0
    gradient[2, :4] = 0  # some of its tokens' hidden units are
    stack.grad = gradient.view_as(stack)
    optimizer.step()
    decayed, after = before * (1 - 0.02 * 0.1), stack.detach().view(3, 8, 8)
    assert torch.equal(after[1], decayed[1])
    assert all(
        (after[expert] - decayed[expert]).square().mean().sqrt() > 0.1 * 0.02 for expert in (0, 2)
    )
    assert optimizer.state[stack]["momentum"].view(3, 8, 8)[1].any()


def test_an_update_has_adamws_root_mean_square_whatever_the_shape() -> None:
    for shape in ((64, 64), (32, 128), (128, 32)):
        parameter = torch.nn.Parameter(torch.zeros(shape))
        parameter.grad = random(*shape)
        optimizer_of(parameter).step()
        assert parameter.detach().square().mean().sqrt().item() == pytest.approx(
            0.2 * 0.02, rel=0.25
        )


def test_the_rest_is_trained_as_by_torchs_adamw_bit_for_bit() -> None:
    start = random(40)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    reference = torch.optim.AdamW(
        [theirs], lr=0.02, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True
    )
    assert torch.equal(
        trained(start, optimizer_of(ours, "adamw"), ours), trained(start, reference, theirs)
    )


def test_hidden_matrices_go_to_muon_and_all_else_to_adamw() -> None:
    mixed = [
        "model.moe.num_shared_experts=1",
        "model.moe.shared_expert_gate=true",
        "model.attention.bias=all",
    ]
    recipe = load_recipe(
        "debug", ["model.vocab_size=128", "optimizer={kind: muon, learning_rate: 1e-3}", *mixed]
    )
    with torch.device("meta"):
        model = DecoderLM(recipe.model)
    groups = parameter_groups(model, recipe.model, recipe.optimizer)
    rules = {id(parameter): group["rule"] for group in groups for parameter in group["params"]}
    by_rule: dict[str, set[str]] = {"muon": set(), "adamw": set()}
    for name, parameter in model.named_parameters():
        by_rule[rules[id(parameter)]].add(name.removeprefix("layers.0."))
    hidden = {f"attention.{part}_proj.weight" for part in "qkvo"} | {
        f"feed_forward.experts.{part}" for part in ("w1", "w2", "w3")
    }
    hidden |= {
        f"feed_forward.shared.feed_forward.{part}_proj.weight" for part in ("gate", "up", "down")
    }
    assert {name for name in by_rule["muon"] if not name.startswith("layers.")} == hidden
    assert {
        "embedding.weight",
        "head.weight",
        "feed_forward.router.gate.weight",
        "feed_forward.shared.gate.weight",
    } <= by_rule["adamw"]
    assert [group["rule"] for group in groups if group.get("moe")] == ["muon"]
    assert is_hidden_matrix(
        "layers.0.attention.q_proj.weight", torch.empty(2, 2), recipe.model
    ) and not is_hidden_matrix("head.weight", torch.empty(2, 2), recipe.model)


@pytest.mark.parametrize(
    "ranks,partition_size,start", [(1, 400, 0), (3, 100, 20), (4, 61, 7), (5, 200, 0)]
)
def test_the_ranks_parts_of_cut_matrices_are_the_matrices(
    ranks: int, partition_size: int, start: int
) -> None:
    """Two matrices of 8 x 9 and padding, in partitions that end anywhere; some ranks are empty."""
    numbers = torch.zeros(ranks * partition_size)
    stack = random(2, 8, 9)
    numbers[start : start + 144] = stack.flatten()
    cut = [
        cut_matrices(
            stack.shape,
            start=start,
            partition_size=partition_size,
            ranks=ranks,
            rank=rank,
            offset=0,
        )
        for rank in range(ranks)
    ]
    for number in range(2):
        parts = []
        for rank, partition in enumerate(numbers.split(partition_size)):
            matrix = cut[rank][number]
            assert matrix.bounds == cut[0][number].bounds and all(
                low <= high for low, high in pairwise(matrix.bounds)
            )
            parts.append(partition[matrix.offset : matrix.offset + matrix.held_by(rank)])
        assert torch.equal(torch.cat(parts).view(8, 9), stack[number])
    owners = choose_owners(cut[0], ranks)
    assert all(cut[0][number].held_by(owner) for number, owner in enumerate(owners))


def test_a_matrix_that_all_ranks_share_has_one_owner_and_the_work_is_spread() -> None:
    matrices = cut_matrices(
        torch.Size((8, 4, 4)), start=0, partition_size=8, ranks=16, rank=0, offset=0
    )
    shared = [matrix._replace(bounds=(0, 4, 8, 12, 16)) for matrix in matrices]
    assert choose_owners(shared, 4) == [0, 1, 2, 3, 0, 1, 2, 3]


@pytest.mark.parametrize("batch", [1, 200, 1 << 26])
def test_a_flat_partition_is_trained_as_its_matrices_are(
    batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (pretrain.optim.matrix_shards, pretrain.optim.muon):
        monkeypatch.setattr(module, "ELEMENTS_A_BATCH", batch)
    start = random(2, 8, 12)
    whole, flat = (
        torch.nn.Parameter(start.clone()),
        torch.nn.Parameter(torch.cat((start.flatten(), torch.zeros(5)))),
    )
    gradient = random(2, 8, 12, seed=1)
    whole.grad, flat.grad = gradient, torch.cat((gradient.flatten(), torch.zeros(5)))
    optimizer = optimizer_of(flat)
    optimizer.shards[flat] = MatrixShards(
        cut_matrices(start.shape, start=0, partition_size=197, ranks=1, rank=0, offset=0), None, CPU
    )
    optimizer_of(whole).step()
    optimizer.step()
    torch.testing.assert_close(flat[:192].view(2, 8, 12), whole, rtol=1e-6, atol=1e-7)
    assert not flat[192:].any()


class Allocations(TorchDispatchMode):
    """The most numbers that were held in tensors made inside, all at once."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.most = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), named: Any = None
    ) -> Any:
        result = function(*arguments, **(named or {}))
        known = {
            given.untyped_storage().data_ptr()
            for given in arguments
            if isinstance(given, torch.Tensor)
        }
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in known:
            self.held += result.numel()
            self.most = max(self.most, self.held)
            weakref.finalize(result, self._released, result.numel())
        return result

    def _released(self, numbers: int) -> None:
        self.held -= numbers


@pytest.mark.parametrize("flat", [False, True])
def test_a_step_adds_a_few_batches_to_memory_and_not_a_share_of_the_parameters(
    flat: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = {}
    for batch in (4 * 16, 1 << 26):
        for module in (pretrain.optim.matrix_shards, pretrain.optim.muon):
            monkeypatch.setattr(module, "ELEMENTS_A_BATCH", batch)
        parameter = torch.nn.Parameter(random(100 * 16) if flat else random(100, 4, 4))
        optimizer = optimizer_of(parameter)
        optimizer.state[parameter]["momentum"] = torch.zeros_like(parameter)
        if flat:
            optimizer.shards[parameter] = MatrixShards(
                cut_matrices(
                    torch.Size((100, 4, 4)), start=0, partition_size=1600, ranks=1, rank=0, offset=0
                ),
                None,
                CPU,
            )
        parameter.grad = random(*parameter.shape)
        with Allocations() as allocations:
            optimizer.step()
        numbers[batch] = allocations.most
    assert numbers[4 * 16] <= 10 * 4 * 16 and numbers[1 << 26] > 3 * 1600


@pytest.mark.parametrize(("device", "expected"), [("cuda", torch.bfloat16), ("cpu", torch.float32)])
def test_precision_follows_the_device_that_iterates_where_the_state_is_kept_on_the_host(
    device: str, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    flat = torch.nn.Parameter(random(96))
    flat.grad, optimizer, asked = random(96), optimizer_of(flat), []
    optimizer.shards[flat] = MatrixShards(
        cut_matrices(torch.Size((8, 12)), start=0, partition_size=96, ranks=1, rank=0, offset=0),
        None,
        torch.device(device),
    )
    monkeypatch.setattr(
        MatrixShards, "transform", lambda shards, **given: asked.append(given["dtype"])
    )
    optimizer.step()
    assert asked == [expected]
