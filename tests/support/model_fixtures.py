"""Fixtures of a briefly trained model: its checkpoint folder, and its Hugging Face export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # imports torch, which most tests of the data pipeline do without
    from tests.support.tiny_checkpoint import Trained


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A trained checkpoint; tests only read it."""
    from tests.support.tiny_checkpoint import make_trained

    return make_trained(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="session")
def exported(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its export as a Hugging Face folder; tests only read it."""
    import torch

    from data_pipeline.shards.token_stream import open_split
    from pretrain.export.convert import export_hf

    output = tmp_path_factory.mktemp("export") / "hf"
    texts = open_split(trained.manifest, "validation")
    export_hf(trained.checkpoint, output, texts, torch.float32, overwrite=False)
    return output
