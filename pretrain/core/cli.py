"""The options that every command shares."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pretrain.core.errors import StorageError
from pretrain.core.plugins import add_plugin_option
from pretrain.core.shipped import recipe_names


class CommandParser(argparse.ArgumentParser):
    """A parser that also serves shell completions (argcomplete)."""

    def parse_args(self, *given: Any, **named: Any) -> Any:
        """As argparse's; a process that a shell started for completions ends here."""
        if "_ARGCOMPLETE" in os.environ:
            # Imported on this path alone: no command pays for it.
            import argcomplete

            argcomplete.autocomplete(self)
        return super().parse_args(*given, **named)


def command_parser(description: str, examples: str) -> argparse.ArgumentParser:
    """A parser whose --help ends with examples; every command takes ``--plugin``."""
    # Raw, because examples keep their line breaks.
    parser = CommandParser(
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_plugin_option(parser)
    return parser


def complete_recipe(prefix: str, **_: Any) -> list[str]:
    """Completions of ``--recipe``: shipped recipes, and paths with this prefix."""
    from argcomplete.completers import FilesCompleter

    return [*recipe_names(), *FilesCompleter(("yaml", "yml"))(prefix)]


def add_recipe_options(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Add ``--recipe`` and ``--set``."""
    add_recipe_option(
        parser,
        default=default,
        required=default is None,
        help="a file in pretrain/recipes/ without .yaml, or a path",
    )
    add_set_option(parser)


def add_recipe_option(
    parser: argparse.ArgumentParser,
    *,
    help: str,
    default: str | None = None,
    required: bool = False,
) -> None:
    """Add ``--recipe`` alone, which the shell completes."""
    recipe = parser.add_argument(
        "--recipe", default=default, required=required, metavar="NAME|PATH", help=help
    )
    # argcomplete looks for this attribute.
    recipe.completer = complete_recipe  # type: ignore[attr-defined]


def add_set_option(
    parser: argparse.ArgumentParser, help: str = "override any recipe field; may be repeated"
) -> None:
    """Add ``--set``, whose values are in ``overrides``."""
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="A.B=C", help=help
    )


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``, see :func:`write_json`."""
    parser.add_argument(
        "--json",
        dest="json_path",
        metavar="PATH",
        help="also write the result as JSON; '-' prints only JSON to standard output",
    )


def write_json(result: Mapping[str, object], path: str | None) -> None:
    """Write a command's machine-readable result if --json asked for it.

    Raises:
        StorageError: if the file cannot be written.
    """
    if path is None:
        return
    text = json.dumps(result, indent=2, sort_keys=False)
    if path == "-":
        sys.stdout.write(text + "\n")
        return
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror}; choose another --json path"
        ) from None
