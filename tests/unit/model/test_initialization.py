"""Initial weights are a function of the seed and each parameter's name alone."""

from __future__ import annotations

import math

import pytest
import torch

from pretrain.model.decoder import DecoderLM
from pretrain.model.init import initialize
from tests.support.tiny_model import KINDS, tiny_config, tiny_model

E = 4
MATRICES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def global_weights(
    config_overrides: tuple[str, ...], ep_size: int, seed: int = 1
) -> dict[str, torch.Tensor]:
    """All weights of the model that ``ep_size`` ranks hold together, experts by layer, global
    number and matrix.
    """
    weights: dict[str, torch.Tensor] = {}
    for ep_rank in range(ep_size):
        model = DecoderLM(tiny_config(*config_overrides), ep_size, ep_rank)
        initialize(model, seed)
        first = ep_rank * E // ep_size
        for name, parameter in model.state_dict().items():
            layer, _, rest = name.partition(".feed_forward.")
            if rest.startswith("experts.w"):
                found = {
                    f"{layer}/{first + local}/{rest[-2:]}": matrix
                    for local, matrix in enumerate(parameter)
                }
            elif "deepspeed_experts" in rest:
                local, matrix = rest.split("deepspeed_experts.")[1].split(".")[:2]
                found = {f"{layer}/{first + int(local)}/{MATRICES[matrix]}": parameter}
            else:
                found = {name.replace("deepspeed_moe.gate.wg", "router.gate"): parameter}
            for key, weight in found.items():
                assert key not in weights or torch.equal(weights[key], weight), (
                    f"{key} differs between ranks"
                )
                weights[key] = weight
    return weights


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ep_size", [1, 2, 4])
def test_weights_do_not_depend_on_ep_size_or_kind(kind: str, ep_size: int) -> None:
    expected, found = (
        global_weights((KINDS["dropless"],), 1),
        global_weights((KINDS[kind],), ep_size),
    )
    assert found.keys() == expected.keys()
    assert sum(len(name.split("/")) == 3 for name in found) == 2 * E * 3
    for name, weight in found.items():
        assert torch.equal(weight, expected[name]), name


def test_each_expert_and_each_seed_has_numbers_of_its_own() -> None:
    weights, others = global_weights((), 1), global_weights((), 1, seed=2)
    matrices = [weight for weight in weights.values() if weight.dim() == 2]
    assert len({weight.flatten()[0].item() for weight in matrices}) == len(matrices)
    for name, weight in weights.items():
        assert weight.dim() == 1 or not torch.equal(weight, others[name]), name


def test_torchs_global_seed_is_neither_read_nor_changed() -> None:
    torch.manual_seed(5)
    first = tiny_model().state_dict()
    torch.manual_seed(6)
    model = DecoderLM(tiny_config())
    state = torch.get_rng_state()
    initialize(model, 1)
    assert torch.equal(state, torch.get_rng_state())
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, first[name]), name


@pytest.mark.parametrize("layers", [2, 8])
def test_projections_into_the_residual_stream_start_smaller(layers: int) -> None:
    model = tiny_model(
        f"model.num_hidden_layers={layers}", "model.layer_pattern={kind: every_nth, n: 2}",
        "model.intermediate_size=64",
        "model.initializer_range=0.02", "model.hidden_size=64",
    )  # fmt: skip
    residual, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == 1).all(), name
        elif name.endswith(("o_proj.weight", "down_proj.weight", "experts.w2")):
            residual.append(parameter.flatten())
        else:
            others.append(parameter.flatten())
    assert len(residual) == 2 * layers  # attention output and feed-forward output of each layer
    assert torch.cat(others).std().item() == pytest.approx(0.02, rel=0.02)
    assert torch.cat(residual).std().item() == pytest.approx(0.02 / math.sqrt(2 * layers), rel=0.02)
    assert abs(torch.cat(residual).mean().item()) < 1e-3
