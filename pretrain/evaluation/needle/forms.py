"""What a needle looks like: a fact that a context states once, and the question for it.

Every form is a sentence with a key and a value. The question is the same sentence up to its value.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from pretrain.core.errors import ConfigError

KEY_MARK, VALUE_MARK = "{key}", "{value}"
ADJECTIVES = (
    "amber bold brisk calm clever copper crimson dusty early gentle golden hollow icy jolly keen"
    " lively mellow misty narrow noble olive pale proud quick quiet rapid rusty silver steady tall"
    " velvet wild"
).split()
NOUNS = (
    "anchor badger beacon bridge candle canyon comet falcon forest garden harbor island kettle"
    " lantern lemon maple meadow mirror otter pebble pepper piano planet raven ribbon river rocket"
    " saddle teapot tunnel violin walnut"
).split()
# The words of the synthetic corpus (pretrain/evaluation/needle/corpus.py).
PAIR_KEYS = tuple(f"k{number}" for number in range(128))
PAIR_VALUES = tuple(f"v{number}" for number in range(64))


@dataclass(frozen=True)
class NeedleForm:
    """A form of needles.

    Attributes:
        sentence: of a needle, with ``{key}`` and, behind it, ``{value}``.
        draw: draws a key and a value.
    """

    name: str
    sentence: str
    draw: Callable[[random.Random], tuple[str, str]]

    def question(self, key: str) -> str:
        """The sentence up to its value, which a model has to continue with it."""
        return self.sentence[: self.sentence.index(VALUE_MARK)].rstrip().replace(KEY_MARK, key)

    def needle(self, key: str, value: str) -> str:
        """The whole sentence."""
        return self.sentence.replace(KEY_MARK, key).replace(VALUE_MARK, value)

    def until_value(self, key: str, value: str) -> str:
        """The sentence with its value, but without what follows it."""
        end = self.sentence.index(VALUE_MARK) + len(VALUE_MARK)
        return self.sentence[:end].replace(KEY_MARK, key).replace(VALUE_MARK, value)


def _magic_number(source: random.Random) -> tuple[str, str]:
    key = f"{source.choice(ADJECTIVES)} {source.choice(NOUNS)}"
    return key, str(source.randint(10_000, 99_999))


def _pair(source: random.Random) -> tuple[str, str]:
    return source.choice(PAIR_KEYS), source.choice(PAIR_VALUES)


FORMS = {
    form.name: form
    for form in (
        # Kamradt's needle in a haystack as RULER (Hsieh et al. 2024) words it, for models of text.
        NeedleForm("magic-number", "\nThe magic number of the {key} is {value}.\n", _magic_number),
        # Two words of the synthetic corpus: associative recall (Arora et al. 2023).
        NeedleForm("pairs", " {key} {value} ", _pair),
    )
}


def needle_form(name: str) -> NeedleForm:
    """A form by its name.

    Raises:
        ConfigError: if there is none.
    """
    if name not in FORMS:
        raise ConfigError(f"--needle-form {name}: there are {', '.join(FORMS)}; name one of them")
    return FORMS[name]
