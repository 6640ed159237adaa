"""The options of ``tools/evaluate.py`` for needles, and what they mean."""

from __future__ import annotations

import argparse

from pretrain.core.errors import ConfigError
from pretrain.evaluation.needle.forms import FORMS
from pretrain.evaluation.needle.score import NeedleOptions

DEFAULTS = NeedleOptions()


def add_needles(parser: argparse.ArgumentParser) -> None:
    """Add the options of needles."""
    group = parser.add_argument_group("needle in a haystack")
    group.add_argument(
        "--needle",
        type=int,
        nargs="*",
        metavar="TOKENS",
        help=(
            "is a value found that a context of held-out text states once? Tokens of each context"
            " (default: the model's positions, and three times half of them)"
        ),
    )
    group.add_argument(
        "--depths",
        type=float,
        nargs="+",
        default=list(DEFAULTS.depths),
        metavar="SHARE",
        help="with --needle: where it is, from 0, the beginning, to 1, right before the question"
        f" (default: {' '.join(f'{depth:g}' for depth in DEFAULTS.depths)})",
    )
    group.add_argument(
        "--needle-samples",
        type=int,
        default=DEFAULTS.samples,
        metavar="N",
        help=f"contexts of each length and depth (default: {DEFAULTS.samples})",
    )
    group.add_argument(
        "--needle-form",
        choices=tuple(FORMS),
        default=DEFAULTS.form,
        help="magic-number, a sentence for models of text, or pairs, two words of the synthetic"
        f" corpus of tools/make_needle_corpus.py (default: {DEFAULTS.form})",
    )


def needle_options(arguments: argparse.Namespace) -> NeedleOptions | None:
    """The needles to look for.

    Raises:
        ConfigError: for options that need --needle.
    """
    if arguments.needle is None:
        for option, default in (
            ("depths", list(DEFAULTS.depths)),
            ("needle_samples", DEFAULTS.samples),
            ("needle_form", DEFAULTS.form),
        ):
            if getattr(arguments, option) != default:
                name = option.replace("_", "-")
                raise ConfigError(f"--{name} belongs to --needle: give it, too")
        return None
    return NeedleOptions(
        arguments.needle,
        arguments.depths,
        arguments.needle_samples,
        arguments.needle_form,
        arguments.positions,
        arguments.data,
        arguments.split,
        arguments.seed,
    )
