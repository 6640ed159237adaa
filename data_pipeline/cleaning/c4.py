"""Rules of the Colossal Clean Crawled Corpus (Raffel et al. 2020, section 2.2).

Left out are the word list, which is no part of the paper, and the removal of repeated
three-sentence spans.
"""

from __future__ import annotations

import re

from data_pipeline.cleaning.config import C4Quality
from data_pipeline.cleaning.stage import Cleaned

# "A terminal punctuation mark (i.e. a period, exclamation mark, question mark, or end quotation
# mark)".
TERMINAL_PUNCTUATION = (".", "!", "?", '"', "”")
ELLIPSES = ("...", "…")
POLICY_PHRASES = (
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)
CITATION = re.compile(r"\[(?:\d{1,4}|edit|citation needed)\]")
BLANK_LINES = re.compile(r"\n{3,}")
SENTENCE_END = re.compile(r"""[.!?]["'”’)\]]{0,3}(?:\s|\Z)""")


class C4Filter:
    """Drops pages, and removes lines from those that stay.

    Edits: ``c4_removed_lines``, ``c4_removed_citations``.
    """

    def __init__(self, config: C4Quality) -> None:
        self.config = config

    def __call__(self, text: str) -> Cleaned:
        config = self.config
        if config.drop_curly_bracket and "{" in text:
            return Cleaned(text, "c4_curly_bracket", f"at character {text.index('{')}")
        if config.drop_lorem_ipsum and "lorem ipsum" in text.lower():
            return Cleaned(
                text, "c4_lorem_ipsum", f"at character {text.lower().index('lorem ipsum')}"
            )
        edits: dict[str, int] = {}
        if config.remove_citations and "[" in text:
            text, count = CITATION.subn("", text)
            if count:
                edits["c4_removed_citations"] = count
        lines = text.split("\n")
        # An empty line separates paragraphs: it is neither a line to judge nor worth a count.
        kept = [line for line in lines if not line.strip() or self._keeps(line)]
        if len(kept) < len(lines):
            text = BLANK_LINES.sub("\n\n", "\n".join(kept)).strip("\n")
            edits["c4_removed_lines"] = len(lines) - len(kept)
        sentences = len(SENTENCE_END.findall(text)) if config.min_sentences else 0
        if sentences < config.min_sentences:
            return Cleaned(
                text,
                "c4_sentences",
                f"{sentences} sentences, the least is {config.min_sentences}",
                edits or None,
            )
        return Cleaned(text, edits=edits or None)

    def _keeps(self, line: str) -> bool:
        config = self.config
        end = line.rstrip()
        if config.require_terminal_punctuation and (
            not end.endswith(TERMINAL_PUNCTUATION) or end.endswith(ELLIPSES)
        ):
            return False
        words = line.split()
        if len(words) < config.min_words_per_line or max(map(len, words)) > config.max_word_length:
            return False
        lowered = line.lower()
        if config.drop_javascript_lines and "javascript" in lowered:
            return False
        return not (
            config.drop_policy_lines and any(phrase in lowered for phrase in POLICY_PHRASES)
        )
