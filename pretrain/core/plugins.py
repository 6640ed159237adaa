"""User modules that define further kinds of components.

Only names that the user gave are imported: by ``--plugin``, or in a recipe that was passed to a
command. A checkpoint, a run or an export also names the plugins it was made with, but a name in a
file is no reason to execute code.
"""

from __future__ import annotations

import argparse
import importlib
import re
import traceback
from collections.abc import Iterable, Sequence
from typing import Any

from pretrain.core.errors import ConfigError, PipelineError
from pretrain.core.files import JsonObject

MODULE_NAME = re.compile(r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$")


class _Loaded:
    """The plugins of this process, in the order of their import."""

    names: list[str] = []


def load_plugins(names: Iterable[str]) -> None:
    """Import the modules that are not imported yet; their kinds count from here on.

    Raises:
        ConfigError: if a name is not that of a module, or its module cannot be imported.
    """
    for name in names:
        if name in _Loaded.names:
            continue
        # import_module would take "../x" for a relative import, with an error that helps nobody.
        if not MODULE_NAME.match(name):
            raise ConfigError(
                f"the plugin '{name}' is not a module's name: write it as in 'import', such as "
                "my_package.parts, and not as a path"
            )
        try:
            importlib.import_module(name)
        except PipelineError as error:
            raise ConfigError(f"the plugin '{name}': {error}") from None
        # Foreign code: a module that calls sys.exit() must not end the command silently.
        except (Exception, SystemExit) as error:
            raise ConfigError(_why_not(name, error)) from error
        _Loaded.names.append(name)


def loaded_plugins() -> tuple[str, ...]:
    """The plugins of this process, which a process that it starts needs too."""
    return tuple(_Loaded.names)


def add_loaded_plugins(content: JsonObject) -> None:
    """Add the plugins of this process to a recipe's mapping, so that a saved recipe is complete.

    A value that is not a list of names is kept, and refused with the rest of the recipe.
    """
    named = content.get("plugins")
    if named is None or (isinstance(named, list) and plugins_in(content) == named):
        missing = [name for name in _Loaded.names if name not in (named or [])]
        if missing:
            content["plugins"] = [*(named or []), *missing]


def plugin_arguments() -> list[str]:
    """The options that pass this process's plugins to a command that it starts."""
    return [part for name in _Loaded.names for part in ("--plugin", name)]


def plugins_in(content: Any) -> list[str]:
    """The plugins that a recipe's mapping names.

    A value that is not a list of names is ignored here, and refused with the rest of the recipe.
    """
    named = content.get("plugins") if isinstance(content, dict) else None
    return [name for name in named if isinstance(name, str)] if isinstance(named, list) else []


def untrusted_plugins(content: Any) -> list[str]:
    """The plugins of a recipe's mapping that the user has not asked this process to import."""
    return [name for name in plugins_in(content) if name not in _Loaded.names]


def trust_remedy(names: Sequence[str]) -> str:
    """The end of an error sentence: how the user allows plugins that a saved recipe names."""
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
    """Imports at once: options after this one may name the plugin's kinds."""

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
    """The error sentence for a plugin that cannot be imported."""
    # If the missing module is on the plugin's own path, the search path is wrong; any other missing
    # module is the plugin's error.
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
