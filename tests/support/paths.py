"""Folders of this checkout, so that no test counts how deep its own file is."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DS_CONFIGS = ROOT / "ds_configs"
LAUNCHERS = ROOT / "launchers"
RECIPES = ROOT / "pretrain" / "recipes"
TESTS = ROOT / "tests"
TOOLS = ROOT / "tools"
# Programs that tests start in processes of their own, most of them one on each rank.
WORKERS = ROOT / "tests" / "support" / "workers"
