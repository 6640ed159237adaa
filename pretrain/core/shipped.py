"""Paths of the files that come with the code: recipes, ds_configs, tools and launchers.

A checkout has the last three as folders of its root, where users look for them. A wheel has them
inside the package (``setup.py``), because a top-level name such as ``tools`` belongs to no project.
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
# The root of the checkout; None if the package was installed from a wheel.
CHECKOUT = None if (PACKAGE / "tools").is_dir() else PACKAGE.parent

RECIPES = PACKAGE / "recipes"
DS_CONFIGS = (CHECKOUT or PACKAGE) / "ds_configs"
LAUNCHERS = (CHECKOUT or PACKAGE) / "launchers"
TOOLS = (CHECKOUT or PACKAGE) / "tools"

DEFAULT_DS_CONFIG = "zero1"


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def ds_config_names() -> list[str]:
    """Names of the shipped ds_configs."""
    return sorted(path.stem for path in DS_CONFIGS.glob("*.json"))


def ds_config_path(name_or_path: str) -> Path:
    """The shipped ds_config with this name (``zero1``), otherwise a file of the user's."""
    is_shipped = name_or_path in ds_config_names()
    return DS_CONFIGS / f"{name_or_path}.json" if is_shipped else Path(name_or_path)


def shown(path: Path) -> str:
    """A shipped script as it is typed in the checkout's folder; its whole path in all others."""
    if CHECKOUT is not None and Path.cwd() == CHECKOUT:
        path = path.relative_to(CHECKOUT)
    return str(path)
