"""From source to folder: content, determinism, reuse, and builds that go wrong."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from data_pipeline import build as module
from data_pipeline.build import BuildResult, build
from data_pipeline.indexed import IndexedReader
from data_pipeline.sources import Document, TextFiles
from data_pipeline.tokenizer import load_tokenizer
from pretrain.config.errors import ConfigError, DataError, StorageError
from pretrain.config.schema import DataConfig
from tests.data_pipeline.conftest import text_config, write_corpus
