"""Unicode normalisation (Unicode Standard Annex 15), control characters and line ends."""

from __future__ import annotations

import re
import unicodedata

from data_pipeline.cleaning.config import Normalize
from data_pipeline.cleaning.stage import Cleaned

# General category Cc without tab, line feed and carriage return, which is a line end. Indentation
# is never touched.
CONTROL_CHARACTERS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]+")
LINE_ENDS = re.compile("\r\n?")


class Normalizer:
    """Normalizes Unicode, line ends and control characters.

    Edits: ``line_ends`` and ``control_characters`` (runs that were replaced), ``normalized`` (1 if
    the Unicode form changed).
    """

    def __init__(self, config: Normalize) -> None:
        self.config = config

    def __call__(self, text: str) -> Cleaned:
        edits: dict[str, int] = {}
        if self.config.unify_line_ends and "\r" in text:
            text, edits["line_ends"] = LINE_ENDS.subn("\n", text)
        if self.config.strip_control_characters:
            text, count = CONTROL_CHARACTERS.subn("", text)
            if count:
                edits["control_characters"] = count
        # Last, because a letter and its accent may meet only once a control character between them
        # is gone.
        if not text.isascii():
            normalized = unicodedata.normalize(self.config.form, text)
            if normalized != text:
                text, edits["normalized"] = normalized, 1
        return Cleaned(text, edits=edits or None)
