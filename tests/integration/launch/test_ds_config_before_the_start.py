"""A ds_config that cannot hold ends a start before the ranks connect; one that holds trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import distributed

import pretrain.train
from pretrain.config.load import load_recipe
from pretrain.core.errors import ConfigError
from pretrain.engine.ds_config import resolve_ds_config
from tests.support.ds_config_mutations import mutations
from tests.support.tiny_run import Tiny, curve, make_tiny, own_process

SAMPLE = 10


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize(
    "ds_config,part",
    [
        ({"zero_optimisation": {"stage": 2}}, "did you mean 'zero_optimization'?"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "only at 3"),
        ({"fp16": {"loss_scale": -1}}, "DeepSpeed refuses it"),
        ({"optimizer": {"type": "Adam"}}, "owned by the recipe's 'optimizer'"),
    ],
)
def test_dry_run_and_start_refuse_in_the_same_words(
    tiny: Tiny, tmp_path: Path, ds_config: dict[str, object], part: str
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(ds_config))
    connected = distributed.is_initialized()
    command = [*tiny.arguments(tmp_path / "run", zero=None), "--ds_config", str(path)]
    sentences = []
    for arguments in (command, [*command, "--dry-run"]):
        with own_process(), pytest.raises(ConfigError) as caught:
            pretrain.train.main(arguments)
        sentences.append(str(caught.value))
    assert sentences[0] == sentences[1] and part in sentences[0]
    assert distributed.is_initialized() == connected and not (tmp_path / "run").exists()


@pytest.mark.full
def test_a_sample_of_accepted_mutations_trains(tiny: Tiny, tmp_path: Path) -> None:
    """What the check lets pass, DeepSpeed trains with."""
    recipe = load_recipe(str(tiny.recipe), ["model.vocab_size=300"])
    accepted = []
    for ds_config in mutations(2000):
        try:
            resolve_ds_config(ds_config, "a mutation", recipe, "fp32", 4, 1)
        except ConfigError:
            continue
        # A monitor may ask for a package or a network.
        if not {"wandb", "comet"} & ds_config.keys():
            accepted.append(ds_config)
    for number, ds_config in enumerate(accepted[:SAMPLE]):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps(ds_config))
        run = tmp_path / f"run{number}"
        arguments = tiny.arguments(run, steps=2, zero=None)
        with own_process():
            assert pretrain.train.main([*arguments, "--ds_config", str(path)]) == 0, ds_config
        assert curve(run)[-1]["step"] == 2
    assert len(accepted) >= SAMPLE
