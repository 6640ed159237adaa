"""The weighted load-balancing loss of an export is that of our training, as transformers computes
it itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.checkpoint.weights import load_model
from pretrain.export.import_hf import import_hf
from pretrain.export.parity import load_exported
from pretrain.export.targets import choose_target
from pretrain.model.decoder import DecoderLM
from tests.support.hf_models import YARN, fields_of, saved, windows, write_config

# One layer of experts each: with several, transformers counts the tokens of all of them together.
ONE: dict[str, dict[str, Any]] = {
    "mixtral": {"num_hidden_layers": 1},
    "olmoe": {"num_hidden_layers": 1},
    "qwen2_moe": {},
    "qwen3_moe": {},
    "gpt_oss": {
        "num_hidden_layers": 1,
        "layer_types": ["sliding_attention"],
        "rope_parameters": YARN,
    },
}


def our_aux_loss(model: DecoderLM, ids_BS: Tensor) -> float:
    """What the auxiliary loss alone adds to the loss of a micro batch."""
    output = model(ids_BS, ids_BS, ids_BS.numel())
    assert output.router is not None
    others = (
        output.nll / ids_BS.numel()
        + model.config.moe.z_loss_weight * output.router.losses_LJ[:, 1].sum()
    )
    return float(output.loss - others)


def their_aux_loss(folder: Path, ids_BS: Tensor) -> float:
    model = load_exported(folder)
    output = model(ids_BS, labels=ids_BS, output_router_logits=True)
    plain = model(ids_BS, labels=ids_BS, output_router_logits=False)
    assert float(output.loss - plain.loss) == pytest.approx(
        model.config.router_aux_loss_coef * float(output.aux_loss), rel=1e-3
    )
    return float(output.loss - plain.loss)


@pytest.mark.parametrize("name", ONE)
def test_both_add_the_same_to_the_loss(name: str, tmp_path: Path) -> None:
    source = tmp_path / "hf"
    saved(source, fields_of(name, router_aux_loss_coef=0.25, **ONE[name]))
    import_hf(source, tmp_path / "ours", overwrite=False)
    model, recipe = load_model(tmp_path / "ours")
    assert len(recipe.model.moe_layers) == 1 and recipe.model.moe.top_k == 2
    with torch.no_grad():  # in inference mode routers keep no statistics
        ours, theirs = our_aux_loss(model, windows()), their_aux_loss(source, windows())
    assert ours == pytest.approx(theirs, rel=1e-4) and ours > 0.25
    assert choose_target(recipe, name).config(recipe.model, 0)["router_aux_loss_coef"] == 0.25


@pytest.mark.parametrize("name", ONE)
def test_several_layers_that_route_alike_add_the_same_too(name: str, tmp_path: Path) -> None:
    """Routers of zeros give each expert the same probability; one by one, the layers' losses are
    summed by us and averaged by them.
    """
    source = tmp_path / "hf"
    changes = {"num_hidden_layers": 3} | (
        {"layer_types": ["full_attention"] * 3} if name == "gpt_oss" else {}
    )
    changes |= {"decoder_sparse_step": 1} if name.startswith("qwen") else {}
    model = saved(source, fields_of(name, router_aux_loss_coef=0.25, **changes))
    with torch.no_grad():
        for each, parameter in model.named_parameters():
            if each.endswith((".gate.weight", ".router.weight", ".router.bias")):
                parameter.zero_()
    model.save_pretrained(source)
    write_config(source, fields_of(name, router_aux_loss_coef=0.25, **changes))
    import_hf(source, tmp_path / "ours", overwrite=False)
    ours, recipe = load_model(tmp_path / "ours")
    with torch.no_grad():  # in inference mode routers keep no statistics
        assert our_aux_loss(ours, windows()) == pytest.approx(
            their_aux_loss(source, windows()), rel=1e-4
        )
    assert len(recipe.model.moe_layers) == 3 and recipe.model.moe.aux_loss_weight == pytest.approx(
        0.25 * 2 / 3
    )
