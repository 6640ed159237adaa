"""The stages of cleaning one after the other."""

from __future__ import annotations

from collections import Counter

from data_pipeline.cleaning.c4 import C4Filter
from data_pipeline.cleaning.code import CodeFilter
from data_pipeline.cleaning.config import Cleaning
from data_pipeline.cleaning.decontaminate import Decontaminator
from data_pipeline.cleaning.gopher import GopherQualityFilter, GopherRepetitionFilter
from data_pipeline.cleaning.language import LanguageFilter
from data_pipeline.cleaning.normalize import Normalizer
from data_pipeline.cleaning.redact import Redactor
from data_pipeline.cleaning.stage import Cleaned, Stage


class Cleaner:
    """Takes a document through a recipe's stages, in the order of :class:`Cleaning`.

    Raises:
        ConfigError: for an unknown language, or an evaluation file that does not exist.
        DataError: for an evaluation file that cannot be read.
    """

    def __init__(self, config: Cleaning) -> None:
        self.stages: list[Stage] = []
        if config.normalize:
            self.stages.append(Normalizer(config.normalize))
        if config.language:
            self.stages.append(LanguageFilter(config.language))
        if config.gopher_quality:
            self.stages.append(GopherQualityFilter(config.gopher_quality))
        if config.gopher_repetition:
            self.stages.append(GopherRepetitionFilter(config.gopher_repetition))
        if config.c4_quality:
            self.stages.append(C4Filter(config.c4_quality))
        if config.code_quality:
            self.stages.append(CodeFilter(config.code_quality))
        self.stages += [rule.implementing_class()(rule) for rule in config.rules]
        if config.decontaminate:
            self.stages.append(Decontaminator(config.decontaminate))
        if config.redact:
            self.stages.append(Redactor(config.redact))

    @property
    def is_needed(self) -> bool:
        """Whether there is any stage; without one :meth:`clean` changes nothing.

        Duplicates are found later, over all documents.
        """
        return bool(self.stages)

    def clean(self, text: str) -> Cleaned:
        """Return the document after all stages, or after the one that dropped it.

        Edits are summed over the stages that it went through.
        """
        edits: Counter[str] = Counter()
        for stage in self.stages:
            cleaned = stage(text)
            if cleaned.edits:
                edits.update(cleaned.edits)
            text = cleaned.text
            if cleaned.dropped:
                return cleaned._replace(edits=dict(edits) or None)
            if not text or text.isspace():
                return Cleaned(
                    text,
                    "empty_after_cleaning",
                    f"after {type(stage).__name__}",
                    dict(edits) or None,
                )
        return Cleaned(text, edits=dict(edits) or None)
