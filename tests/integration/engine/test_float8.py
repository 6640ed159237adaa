"""Linear layers in fp8, with the rounding emulated where the hardware has none of it."""

from __future__ import annotations

import pytest
import torch

from pretrain.config.load import load_recipe
from pretrain.core.errors import ConfigError
from pretrain.engine.float8 import convert_linears, takes_fp8
from pretrain.engine.part_precision import part_precisions
from pretrain.engine.precision import resolve_precision
from pretrain.model.decoder import DecoderLM
from pretrain.model.init import initialize
from pretrain.model.moe.product_keys import ProductKeys

CPU = torch.device("cpu")
SHARED = "model.moe.num_shared_experts=1"


def model_of(*overrides: str) -> DecoderLM:
    recipe = load_recipe(
        "debug", ["model.vocab_size=128", "model.initializer_range=0.15", SHARED, *overrides]
    )
    model = DecoderLM(recipe.model)
    initialize(model, 1)
    return model


def loss_and_gradients(model: DecoderLM) -> tuple[float, dict[str, torch.Tensor]]:
    tokens = torch.randint(0, 128, (2, 33), generator=torch.Generator().manual_seed(5))
    model = model.to(torch.bfloat16)
    loss = model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), 64.0).loss
    loss.backward()
    return loss.item(), {
        name: parameter.grad.float()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def test_fp8_stays_close_to_bf16_and_is_not_bf16() -> None:
    plain, converted = model_of(), model_of()
    convert_linears(converted, CPU)
    (expected, references), (found, gradients) = (
        loss_and_gradients(plain),
        loss_and_gradients(converted),
    )
    assert found == pytest.approx(expected, rel=0.01) and found != expected
    assert references.keys() == gradients.keys()
    query = "layers.0.attention.q_proj.weight"
    error = (gradients[query] - references[query]).norm() / references[query].norm()
    assert 1e-3 < error < 0.3


def test_parameters_stay_the_same_objects_under_the_same_names() -> None:
    """DeepSpeed's marks on experts are on the objects, checkpoints go by the names."""
    model = model_of("model.moe.kind=deepspeed", "model.moe.drop_tokens=false")
    before = dict(model.named_parameters())
    convert_linears(model, CPU)
    after = dict(model.named_parameters())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    converted = {
        name for name, module in model.named_modules() if type(module).__name__ == "Float8Linear"
    }
    assert converted == {name for name, module in model.named_modules() if takes_fp8(module, name)}
    names = " ".join(sorted(converted))
    assert (
        "attention.q_proj" in names
        and "deepspeed_experts.0.down_proj" in names
        and "shared.feed_forward.up_proj" in names
    )
    assert "gate.wg" not in names and "head" not in names


def test_a_model_whose_sizes_do_not_fit_is_refused() -> None:
    attention = (
        "model.attention={kind: gqa, num_attention_heads: 3, num_key_value_heads: 3, head_dim: 6}"
    )
    with pytest.raises(
        ConfigError, match="no projection of this model has sides that are multiples of 16"
    ):
        convert_linears(model_of("model.hidden_size=24", attention), CPU)


def test_hardware_without_fp8_is_refused_with_the_reason() -> None:
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9):
        assert resolve_precision("fp8") == "fp8"
        return
    with pytest.raises(
        ConfigError,
        match=(
            "train.precision is fp8, which needs a GPU of compute capability 8.9 or more, but this"
        ),
    ):
        resolve_precision("fp8")


PEER = (
    "model.moe={kind: peer, product_key_sizes: [8, 8], query_dim: 16, num_heads: 2, top_k: 4,"
    " moe_intermediate_size: 1}"
)


@pytest.mark.parametrize(
    "overrides",
    [
        (SHARED,),
        (SHARED, "model.moe.kind=deepspeed", "model.moe.drop_tokens=false"),
        (PEER,),
        (PEER, "model.hidden_size=48"),
        (SHARED, "model.intermediate_size=40", "model.layer_pattern={kind: first_k_dense, k: 1}"),
    ],
)
@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_what_is_stated_of_each_part_is_what_the_converted_and_cast_model_does(
    overrides: tuple[str, ...], precision: str
) -> None:
    recipe = load_recipe("debug", ["model.vocab_size=128", *overrides])
    model = DecoderLM(recipe.model)
    initialize(model, 1)
    if precision == "fp8":
        convert_linears(model, CPU)
    model = model.to(torch.bfloat16)
    done: dict[str, int] = {"fp8": 0, "fp32": 0}
    for module in model.modules():
        own = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        # Sub-keys are bf16, and multiplied in fp32 (ProductKeys.scores).
        kept = isinstance(module, ProductKeys) or any(
            parameter.dtype == torch.float32 for parameter in module.parameters(recurse=False)
        )
        done["fp8"] += own * (type(module).__name__ == "Float8Linear")
        done["fp32"] += own * kept
    stated = part_precisions(recipe.model, precision)
    for form, count in done.items():
        found = sum(part.parameters for part in stated if part.precision == form)
        # Gates multiply in fp32 whatever their weights are kept in.
        gates = sum(one.parameters for one in stated if one.part == "router") * (form == "fp32")
        assert found - gates <= count <= found, (form, stated)
    assert {part.precision for part in stated} <= {"fp8", "bf16", "fp32"}
    assert all(part.reason for part in stated)
    if "model.intermediate_size=40" in overrides and precision == "fp8":
        (dense,) = [part for part in stated if part.part == "dense feed-forwards"]
        assert dense.precision == "bf16" and "no multiple of 16" in dense.reason


def test_parts_of_the_recipe_of_a_million_experts_are_stated() -> None:
    stated = {
        part.part: part.precision
        for part in part_precisions(load_recipe("peer_mla_16b").model, "fp8")
    }
    assert stated == {
        "embedding": "bf16",
        "norms": "bf16",
        "attention projections": "fp8",
        "dense feed-forwards": "fp8",
        "product keys": "fp32",
        "retrieval queries": "bf16",
        "experts": "fp32",
        "head": "bf16",
    }
