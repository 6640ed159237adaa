"""Compiled blocks give the numbers of eager ones, under the same names."""

from __future__ import annotations

import pytest
import torch

from pretrain.config.load import load_recipe
from pretrain.engine.compile import compile_blocks
from pretrain.model.decoder import DecoderLM
from pretrain.model.init import initialize

MIXED = ["model.layer_pattern={kind: every_nth, n: 2}", "model.intermediate_size=24"]


def model_of(recomputed: bool) -> DecoderLM:
    model = DecoderLM(
        load_recipe("debug", ["model.vocab_size=128", *MIXED]).model,
        activation_checkpointing=recomputed,
    )
    initialize(model, 1)
    return model


def loss_of(model: DecoderLM, document_mask: bool = False) -> torch.Tensor:
    tokens = torch.randint(0, 128, (2, 17), generator=torch.Generator().manual_seed(5))
    inputs = tokens[:, :-1].contiguous()
    model.zero_grad(set_to_none=True)
    loss: torch.Tensor = model(
        inputs,
        tokens[:, 1:].contiguous(),
        32.0,
        (inputs % 11 == 0).cumsum(1) if document_mask else None,
    ).loss
    loss.backward()
    return loss.detach()


def difference(compiled: DecoderLM, eager: DecoderLM, document_mask: bool = False) -> float:
    """The largest of the loss's and of every gradient, relative to the largest number of each."""
    pairs = [(loss_of(compiled, document_mask), loss_of(eager, document_mask))]
    pairs += [
        (a.grad, b.grad)
        for a, b in zip(compiled.parameters(), eager.parameters(), strict=True)
        if a.grad is not None and b.grad is not None
    ]
    assert len(pairs) == 1 + len(list(eager.parameters()))
    return max(((a - b).abs().max() / b.abs().max().clamp_min(1e-12)).item() for a, b in pairs)


def test_traced_blocks_give_the_eager_numbers_under_the_same_names_and_one_graph_serves_all_layers() -> (
    None
):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled, eager = model_of(recomputed=True), model_of(recomputed=True)
    compile_blocks(compiled, backend="aot_eager")
    assert list(compiled.state_dict()) == list(eager.state_dict())
    assert difference(compiled, eager) <= 1e-5
    counters = torch._dynamo.utils.counters
    assert (
        counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    )  # one of dense blocks, one of attention alone
    with torch.no_grad():
        eager.layers[0].get_submodule("attention").get_parameter("q_proj.weight").mul_(1.01)
    assert difference(compiled, eager) > 1e-5


@pytest.mark.full
@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("recomputed", [False, True])
def test_generated_code_gives_the_eager_numbers(recomputed: bool, document_mask: bool) -> None:
    torch._dynamo.reset()
    compiled, eager = model_of(recomputed), model_of(recomputed)
    compile_blocks(compiled)
    assert difference(compiled, eager, document_mask) <= 1e-5
