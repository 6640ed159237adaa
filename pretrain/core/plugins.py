"""Modules of the user that define further kinds of parts.

Only names that the user gave are imported: by ``--plugin``, or in a recipe that was passed to a
command. A checkpoint, a run or an export also says which plugins it was made with, but naming code
is no reason to execute it.
"""

from __future__ import annotations

import argparse
import importlib
import re
import traceback
from collections.abc import Iterable, Sequence
from typing import Any

from pretrain.core.errors import ConfigError, PipelineError

MODULE_NAME = re.compile(r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$")


class _Loaded:
    """The plugins of this process, in the order in which they were imported."""

    names: list[str] = []


def load_plugins(names: Iterable[str]) -> None:
    """Import the modules that are not imported yet, so that the kinds that they define count from
    here on.

    Raises:
        ConfigError: if a name is not that of a module, or its module cannot be imported.
    """
    for name in names:
        if name in _Loaded.names:
            continue
        if not MODULE_NAME.match(name):
            raise ConfigError(
                f"the plugin '{name}' is not a module's name: write it as in 'import', such as "
                "my_package.parts, and not as a path"
            )
        try:
            importlib.import_module(name)
        except PipelineError as error:
            raise ConfigError(f"the plugin '{name}': {error}") from None
        except (Exception, SystemExit) as error:
            raise ConfigError(_why_not(name, error)) from error
        _Loaded.names.append(name)


def loaded_plugins() -> tuple[str, ...]:
    """Return the plugins of this process; a process that it starts needs the same ones."""
    return tuple(_Loaded.names)


def add_loaded_plugins(content: dict[str, Any]) -> None:
    """Add the plugins of this process to a recipe's mapping, so that what is saved is complete.

    What is not a list of names stays as it is, to be refused with the rest of the recipe.
    """
    named = content.get("plugins")
    if named is None or (isinstance(named, list) and plugins_in(content) == named):
        missing = [name for name in _Loaded.names if name not in (named or [])]
        if missing:
            content["plugins"] = [*(named or []), *missing]


def plugin_arguments() -> list[str]:
    """Return the options that give this process's plugins to a command that it starts."""
    return [part for name in _Loaded.names for part in ("--plugin", name)]


def plugins_in(content: Any) -> list[str]:
    """Return the plugins that a recipe's mapping names.

    What is not a list of names is passed over here, and refused with the rest of the recipe.
    """
    named = content.get("plugins") if isinstance(content, dict) else None
    return [name for name in named if isinstance(name, str)] if isinstance(named, list) else []


def untrusted_plugins(content: Any) -> list[str]:
    """Return those plugins of a recipe's mapping that nobody has asked this process to import."""
    return [name for name in plugins_in(content) if name not in _Loaded.names]


def trust_remedy(names: Sequence[str]) -> str:
    """Return how the user gives plugins that a saved recipe names, as the end of a sentence."""
    options = " ".join(f"--plugin {name}" for name in names)
    return f"give {options} if you trust {'it' if len(names) == 1 else 'them'}"


def add_plugin_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--plugin MODULE``, which imports the module while the command line is read."""
    parser.add_argument(
        "--plugin",
        dest="plugins",
        action=_Import,
        default=[],
        metavar="MODULE",
        help="import a module that defines kinds of parts (docs/extending.md); may be repeated",
    )


class _Import(argparse.Action):
    """Imports at once: what is read after this option may be of the plugin's kinds."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        load_plugins([values])
        setattr(namespace, self.dest, [*getattr(namespace, self.dest), values])


def _why_not(name: str, error: BaseException) -> str:
    # A module of the plugin's own path that is missing is the user's search path; any other one is
    # the plugin's matter.
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if missing is not None and (name == missing or name.startswith(f"{missing}.")):
        return (
            f"the plugin '{name}' is not found: no module is named '{missing}'; install its "
            "package, or set PYTHONPATH to the folder that holds it (the current folder is not)"
        )
    cause = " ".join(f"{type(error).__name__}: {error}".split())
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "importlib" not in frame.filename and frame.filename != __file__
    ]
    where = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return f"the plugin '{name}' cannot be imported: {cause}{where}; fix it, or leave it out"
