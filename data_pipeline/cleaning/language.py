"""Identifies the language of a text with py3langid (Lui & Baldwin 2012).

It is a naive Bayes classifier over byte n-grams.
"""

from __future__ import annotations

import difflib
from functools import lru_cache
from typing import TYPE_CHECKING

from data_pipeline.cleaning.config import Language
from data_pipeline.cleaning.stage import Cleaned
from pretrain.core.errors import ConfigError

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

SAMPLE_PARTS = 4
PART_CHARACTERS = 250


@lru_cache(maxsize=1)
def _identifier() -> LanguageIdentifier:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def sample_of(text: str) -> str:
    """Return a short text as it is, and four parts of a long one, from its start to its end.

    A text is long above 1,000 characters; a part has 250.
    """
    if len(text) <= SAMPLE_PARTS * PART_CHARACTERS:
        return text
    stride = (len(text) - PART_CHARACTERS) / (SAMPLE_PARTS - 1)
    starts = [int(number * stride) for number in range(SAMPLE_PARTS)]
    return "\n".join(text[start : start + PART_CHARACTERS] for start in starts)


class LanguageFilter:
    """Keeps documents whose likeliest language is wanted and likely enough.

    Raises:
        ConfigError: for a language that py3langid does not know.
    """

    def __init__(self, config: Language) -> None:
        self.config = config
        self.keep = frozenset(config.keep)
        known = _identifier().labels
        for code in config.keep:
            if code not in known:
                near = difflib.get_close_matches(code, known, 1, 0)[0]
                raise ConfigError(
                    f"data.cleaning.language.keep: py3langid knows no language '{code}': use an ISO"
                    f" 639-1 code, such as '{near}'"
                )

    def __call__(self, text: str) -> Cleaned:
        language, probability = _identifier().classify(sample_of(text))
        if language in self.keep and probability >= self.config.min_probability:
            return Cleaned(text)
        wanted = f"{', '.join(self.config.keep)} from {self.config.min_probability:g}"
        return Cleaned(
            text, "language", f"{language} with probability {probability:.3f}, kept are {wanted}"
        )
