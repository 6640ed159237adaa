"""Linear layers in fp8, with the rounding emulated where the hardware has none of it."""

from __future__ import annotations

import pytest
import torch

from pretrain.config.load import load_recipe
from pretrain.core.errors import ConfigError
from pretrain.engine.float8 import convert_linears, takes_fp8
from pretrain.engine.precision import resolve_precision
from pretrain.model.decoder import DecoderLM
from pretrain.model.init import initialize

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
