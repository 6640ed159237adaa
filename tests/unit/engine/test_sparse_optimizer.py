"""The optimizer of tables: each row is trained as a parameter of its own over the steps that used
it, and nothing else is touched.
"""

from __future__ import annotations

import psutil
import pytest
import torch

from pretrain.engine.sparse_optimizer import SparseOptimizer, TableGroups, TableState, _lazy_zeros
from pretrain.model.moe.tables.interface import Bags
from pretrain.model.moe.tables.products import BAGS, PLAIN, ExpertTable, SortedFactors
from pretrain.optim.config import AdamWConfig, SGDConfig

ADAMW = AdamWConfig(learning_rate=0.1, weight_decay=0.3, beta1=0.8, beta2=0.9)
CONFIGS: dict[str, AdamWConfig | SGDConfig] = {
    "adamw": ADAMW,
    "sgd": SGDConfig(kind="sgd", learning_rate=0.01),
    "momentum": SGDConfig(kind="sgd", learning_rate=0.01, momentum=0.9),
}
ALONE, CPU = TableGroups(None, None), torch.device("cpu")
E, X, D, T = 12, 2, 5, 7


def torch_optimizer(
    parameters: list[torch.nn.Parameter], config: AdamWConfig | SGDConfig
) -> torch.optim.Optimizer:
    if isinstance(config, AdamWConfig):
        return torch.optim.AdamW(
            parameters,
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=config.weight_decay,
        )
    return torch.optim.SGD(parameters, lr=config.learning_rate, momentum=config.momentum)


def table_of(weight: torch.Tensor) -> ExpertTable:
    table = ExpertTable(*weight.shape)
    with torch.no_grad():
        table.weight.copy_(weight)
    return table


def choice(seed: int, experts: int = E) -> Bags:
    """Some experts for each of T tokens: none for the first, one twice for the last."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, experts, (token % 4,), generator=generator) for token in range(T)]
    rows[-1][:2] = rows[-1][0]
    return Bags(torch.cat(rows), torch.tensor([0, *(len(row) for row in rows)]).cumsum(0))


def forward(table: ExpertTable, x_TD: torch.Tensor, bags: Bags) -> torch.Tensor:
    """Both products, so that both kinds of gradient arise."""
    return table.weighted(table.dots(x_TD, bags, BAGS).tanh(), bags, BAGS).square().sum()


@pytest.mark.parametrize("name", CONFIGS)
def test_each_row_is_trained_over_the_steps_that_used_it(name: str) -> None:
    """The reference is torch's optimizer over one parameter an expert, whose gradient is None where
    no token chose it.
    """
    config, weight = CONFIGS[name], torch.randn(E, X, D)
    table = table_of(weight)
    rows = SparseOptimizer({"t": table}, config, ALONE, "bags", CPU)
    parameters = [torch.nn.Parameter(expert.clone()) for expert in weight]
    reference = torch_optimizer(parameters, config)
    for step in range(12):
        bags, x_TD = choice(step), torch.randn(T, D)
        forward(table, x_TD.requires_grad_(), bags).backward()
        rows.reduce(1.0)
        rows.step(config.learning_rate, 1.0)
        dense = table_of(torch.stack([parameter.detach() for parameter in parameters]))
        forward(dense, x_TD.detach().requires_grad_(), bags).backward()
        for expert, parameter in enumerate(parameters):
            parameter.grad = dense.weight.grad[expert] if (bags.row_P == expert).any() else None
        reference.step()
        torch.testing.assert_close(
            table.weight,
            torch.stack([parameter.detach() for parameter in parameters]),
            rtol=2e-5,
            atol=2e-6,
        )


def test_where_every_step_uses_every_row_it_is_the_dense_optimizer() -> None:
    weight = torch.randn(E, 1, D)
    table, dense = table_of(weight), table_of(weight)
    rows, reference = (
        SparseOptimizer({"t": table}, ADAMW, ALONE, "bags", CPU),
        torch_optimizer([dense.weight], ADAMW),
    )
    bags = Bags(torch.arange(E).repeat(T), torch.arange(0, T * E + 1, E))
    for _ in range(8):
        x_TD = torch.randn(T, D, requires_grad=True)
        for one in (table, dense):
            forward(one, x_TD, bags).backward()
        rows.reduce(1.0)
        rows.step(ADAMW.learning_rate, 1.0)
        reference.step()
        reference.zero_grad()
        torch.testing.assert_close(table.weight, dense.weight.detach(), rtol=1e-5, atol=1e-6)


def test_collected_gradients_of_several_batches_are_the_dense_gradient() -> None:
    weight = torch.randn(E, X, D)
    table, dense = table_of(weight), table_of(weight)
    rows = SparseOptimizer(
        {"t": table}, SGDConfig(kind="sgd", learning_rate=1.0), ALONE, "bags", CPU
    )
    for seed in range(3):
        bags, x_TD = choice(seed), torch.randn(T, D, requires_grad=True)
        for one in (table, dense):
            forward(one, x_TD, bags).backward()
    norm = rows.reduce(4.0)
    torch.testing.assert_close(norm * 4.0, dense.weight.grad.norm())
    rows.step(1.0, 0.5)
    torch.testing.assert_close(
        weight - table.weight, 0.5 * dense.weight.grad / 4.0, rtol=1e-4, atol=1e-5
    )


def test_a_discarded_step_leaves_everything_as_it_was() -> None:
    table = table_of(torch.randn(E, X, D))
    rows, before = SparseOptimizer({"t": table}, ADAMW, ALONE, "bags", CPU), table.weight.clone()
    forward(table, torch.randn(T, D, requires_grad=True), choice(1)).backward()
    rows.reduce(1.0)
    rows.discard()
    rows.step(0.1, 1.0)
    assert torch.equal(table.weight, before) and rows.states["t"].steps.sum() == 0


def test_only_used_rows_move_and_are_saved() -> None:
    table = table_of(torch.randn(E, X, D))
    rows, before, bags = (
        SparseOptimizer({"t": table}, ADAMW, ALONE, "bags", CPU),
        table.weight.clone(),
        choice(5),
    )
    forward(table, torch.randn(T, D, requires_grad=True), bags).backward()
    rows.reduce(1.0)
    rows.step(0.1, 1.0)
    used = sorted({int(row) for row in bags.row_P})
    assert [
        expert for expert in range(E) if not torch.equal(table.weight[expert], before[expert])
    ] == used
    state = rows.states["t"].state()
    assert (
        sorted({int(row) // X for row in state["row"]}) == used
        and state["exp_avg"].shape[0] == len(used) * X
    )
    fresh = TableState(table.weight.flatten(0, 1), 0, E * X, ADAMW)
    fresh.load(state)
    assert all(
        torch.equal(fresh.moments[name], rows.states["t"].moments[name]) for name in fresh.moments
    )
    assert torch.equal(fresh.steps, rows.states["t"].steps)


def test_state_of_rows_that_were_never_used_takes_no_memory() -> None:
    """256 MB of zeros, of which a row in a thousand is written."""
    process = psutil.Process()
    before = process.memory_info().rss
    zeros = _lazy_zeros(1 << 17, 512, CPU)
    zeros[::1000] = 1.0
    assert zeros.sum() == 132 * 512
    lazy = _lazy_zeros(1 << 17, 512, CPU)
    lazy[::1000] = 1.0
    grown = process.memory_info().rss - before
    assert grown < 300e6, f"{grown / 1e6:.0f} MB for two tables of 268 MB, one of them read whole"


def test_gradient_memory_follows_the_pairs_and_not_the_table() -> None:
    sizes = []
    for experts in (64, 1 << 16):
        table = ExpertTable(experts, 1, D)
        table.collect(CPU)
        forward(table, torch.randn(T, D, requires_grad=True), choice(3, 64)).backward()
        sizes.append([sum(tensor.numel() for tensor in factors) for factors in table.collected])
    assert sizes[0] == sizes[1] and len(sizes[0]) == 2


@pytest.mark.parametrize("kernel", [PLAIN, BAGS], ids=["plain", "bags"])
def test_a_rows_gradient_adds_its_pairs_in_their_order(kernel: object) -> None:
    table = table_of(torch.randn(E, X, D))
    table.collect(CPU)
    bags, x_TD = choice(2), torch.randn(T, D, requires_grad=True)
    table.dots(x_TD, bags, BAGS).sum().backward()
    (factors,) = table.collected
    by_row = SortedFactors(factors, kernel)
    expected = torch.zeros(E * X, D).index_add(
        0, factors.row_P, factors.c_P[:, None] * factors.x_TD[factors.owner_P]
    )
    got = torch.zeros(E * X, D)
    for first in range(0, by_row.row_U.numel(), 3):
        part = slice(first, min(first + 3, by_row.row_U.numel()))
        got[by_row.row_U[part]] = by_row.gradient(part)
    torch.testing.assert_close(got, expected)


def test_a_state_that_is_taken_back_forgets_what_was_used_since() -> None:
    state = TableState(torch.randn(6, 4), 0, 6, ADAMW)
    state.update(torch.tensor([0, 2]), torch.ones(2, 4), 0.1)
    saved = {name: tensor.clone() for name, tensor in state.state().items()}
    state.update(torch.tensor([1, 2]), torch.ones(2, 4), 0.1)
    assert not all(torch.equal(tensor, saved[name]) for name, tensor in state.state().items())
    state.load(saved)
    assert state.steps.tolist() == [1, 0, 1, 0, 0, 0]
    assert all(torch.equal(tensor, saved[name]) for name, tensor in state.state().items())
    assert all(not moment[[1, 3, 4, 5]].any() for moment in state.moments.values())
