"""Compiled blocks give the numbers of eager ones, under the same names."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from pretrain.config.load import load_recipe
from pretrain.engine.compile import chosen_form, compile_blocks, compile_experts_and_head
from pretrain.model.config import Recomputation
from pretrain.model.decoder import DecoderLM
from pretrain.model.init import initialize
from tests.support.tiny_model import RECOMPUTATIONS

MIXED = ["model.layer_pattern={kind: every_nth, n: 2}", "model.intermediate_size=24"]


def model_of(recomputed: Recomputation, *overrides: str) -> DecoderLM:
    model = DecoderLM(
        load_recipe("debug", ["model.vocab_size=128", *MIXED, *overrides]).model,
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
    compiled, eager = model_of("full"), model_of("full")
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


def test_selective_recomputation_of_traced_blocks_gives_the_eager_numbers() -> None:
    torch._dynamo.reset()
    compiled, eager = model_of("selective"), model_of("selective")
    compile_blocks(compiled, backend="aot_eager")
    assert difference(compiled, eager) <= 1e-5
    assert difference(compiled, eager, document_mask=True) <= 1e-5


@pytest.mark.parametrize(
    ("asked", "device", "capability", "zero_stage", "expected"),
    [
        ("auto", "cpu", None, 1, "none"),
        ("auto", "cuda", (9, 0), 1, "blocks"),
        ("auto", "cuda", (7, 0), 2, "blocks"),
        ("auto", "cuda", (6, 1), 1, "none"),
        ("auto", "cuda", (9, 0), 3, "none"),
        ("auto", "xpu", None, 1, "none"),
        ("none", "cuda", (9, 0), 1, "none"),
        ("all", "cpu", None, 1, "all"),
    ],
)
def test_auto_compiles_blocks_on_gpus(
    asked: str,
    device: str,
    capability: tuple[int, int] | None,
    zero_stage: int,
    expected: str,
) -> None:
    assert chosen_form(asked, device, capability, zero_stage) == expected


def test_the_default_does_not_bring_the_compiler_on_a_cpu() -> None:
    recipe = load_recipe("debug")
    assert recipe.train.compile == "auto"
    assert chosen_form(recipe.train.compile, "cpu", None, 1) == "none"
    program = (
        "import sys, torch\n"
        "from pretrain.engine.compile import chosen_form, compile_model\n"
        "from pretrain.engine.build import with_kernel\n"
        "from pretrain.config.load import load_recipe\n"
        "from pretrain.model.decoder import DecoderLM\n"
        "recipe = load_recipe('debug', ['model.vocab_size=64'])\n"
        "model = DecoderLM(with_kernel(recipe, 'cpu'), activation_checkpointing='none')\n"
        "compile_model(model, chosen_form('auto', 'cpu', None, 1))\n"
        "assert 'torch._dynamo' not in sys.modules, 'the compiler'\n"
        "assert 'torch.nn.attention.varlen' not in sys.modules, 'a kernel of CUDA'\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.full
@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("recomputed", RECOMPUTATIONS)
def test_generated_code_gives_the_eager_numbers(
    recomputed: Recomputation, document_mask: bool
) -> None:
    torch._dynamo.reset()
    compiled, eager = model_of(recomputed), model_of(recomputed)
    compile_blocks(compiled)
    assert difference(compiled, eager, document_mask) <= 1e-5


SHARED = "model.moe.num_shared_experts=1"
# Chunks of 12 of 32 tokens: the last one is shorter.
EXPERTS = {
    "swiglu": (SHARED, "model.loss_chunk_tokens=12", "model.output_z_loss_weight=0.001"),
    "product_swiglu": (SHARED, "model.feed_forward={kind: product_swiglu, bias: true}"),
    "grouped products": ("model.moe.expert_kernel=grouped_mm", "model.feed_forward.kind=gelu"),
}


def losses_of(model: DecoderLM, steps: int = 4) -> list[float]:
    """Losses of a few steps, in which experts get other numbers of rows each time."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(steps):
        losses.append(loss_of(model).item())
        optimizer.step()
    return losses


@pytest.mark.parametrize("form", EXPERTS)
def test_traced_experts_and_head_give_the_eager_numbers_in_every_step(form: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled, eager = (model_of("none", *EXPERTS[form]) for _ in range(2))
    compile_experts_and_head(compiled, backend="aot_eager")
    assert list(compiled.state_dict()) == list(eager.state_dict())
    assert difference(compiled, eager) <= 1e-6
    assert losses_of(compiled) == pytest.approx(losses_of(eager), rel=1e-6)
    assert not torch._dynamo.utils.counters["graph_break"]
    # Activation, shared experts and loss, and the loss of a shorter last chunk: none a row count.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4
    wrong = compiled.head.chunk_losses
    compiled.head.chunk_losses = lambda *given: tuple(1.001 * one for one in wrong(*given))
    assert difference(compiled, eager) > 1e-5


@pytest.mark.full
@pytest.mark.parametrize("form", EXPERTS)
def test_generated_code_of_experts_and_head_gives_the_eager_numbers(form: str) -> None:
    torch._dynamo.reset()
    compiled, eager = (model_of("full", *EXPERTS[form]) for _ in range(2))
    compile_blocks(compiled)
    compile_experts_and_head(compiled)
    assert difference(compiled, eager) <= 1e-5
    assert losses_of(compiled) == pytest.approx(losses_of(eager), rel=1e-6)
