from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data_pipeline.shards.token_stream import open_split
from pretrain.export.convert import export_hf
from tests.export.tiny_checkpoint import Trained, make_trained


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return make_trained(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="session")
def exported(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("export") / "hf"
    export_hf(
        trained.checkpoint,
        output,
        open_split(trained.manifest, "validation"),
        torch.float32,
        overwrite=False,
    )
    return output
