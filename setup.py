"""The dynamic part of pyproject.toml.

Requirements come from the sections of one file, and folders of the root become packages.
"""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

# A user finds these at the top of a checkout; in a wheel they are inside `pretrain`.
# pretrain/core/shipped.py knows both places.
INSIDE_THE_PACKAGE = ("tools", "launchers", "ds_configs")


def requirements() -> dict[str, list[str]]:
    """Return the lines of requirements.txt by extra; those under "" are always needed.

    A comment `# [name] ...` begins an extra.
    """
    sections: dict[str, list[str]] = {"": []}
    name = ""
    for line in Path("requirements.txt").read_text(encoding="utf-8").splitlines():
        if opened := re.match(r"# \[([\w-]+)\]", line):
            name = opened[1]
            sections[name] = []
        elif requirement := line.partition("#")[0].strip():
            sections[name].append(requirement)
    return sections


def main() -> None:
    """Pass setuptools what pyproject.toml calls dynamic."""
    extras = requirements()
    needed = extras.pop("")
    extras["all"] = [line for name, lines in extras.items() if name != "dev" for line in lines]
    packages = find_packages(include=["pretrain", "pretrain.*", "data_pipeline", "data_pipeline.*"])
    setup(
        install_requires=needed,
        extras_require=extras,
        packages=[*packages, *(f"pretrain.{name}" for name in INSIDE_THE_PACKAGE)],
        package_dir={f"pretrain.{name}": name for name in INSIDE_THE_PACKAGE},
    )


main()
