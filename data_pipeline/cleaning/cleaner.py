"""The stages of cleaning one after the other."""

from __future__ import annotations

from collections import Counter

from data_pipeline.cleaning.c4 import C4Filter
from data_pipeline.cleaning.code import CodeFilter
from data_pipeline.cleaning.config import Cleaning, CleaningRule
from data_pipeline.cleaning.decontaminate import Decontaminator
from data_pipeline.cleaning.gopher import GopherQualityFilter, GopherRepetitionFilter
from data_pipeline.cleaning.language import LanguageFilter
from data_pipeline.cleaning.normalize import Normalizer
from data_pipeline.cleaning.redact import Redactor
from data_pipeline.cleaning.stage import Cleaned, Stage
from pretrain.core.registry import kind_name


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
        self.stages += [_CheckedRule(rule) for rule in config.rules]
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
                    f"after {getattr(stage, 'name', type(stage).__name__)}",
                    dict(edits) or None,
                )
        return Cleaned(text, edits=dict(edits) or None)


class _CheckedRule:
    """A rule of a plugin, whose mistakes are found at the document that shows them."""

    def __init__(self, config: CleaningRule) -> None:
        self.name = kind_name(type(config))
        self.rule: Stage = config.implementing_class()(config)

    def __call__(self, text: str) -> Cleaned:
        try:
            cleaned = self.rule(text)
        except Exception as error:
            error.add_note(f"in the cleaning rule '{self.name}'")
            raise
        # A text of None would count as one that cleaning has emptied, and other counts than
        # integers would end the build at its manifest, after all the work.
        if (
            not isinstance(cleaned, Cleaned)
            or not isinstance(cleaned.text, str)
            or not all(type(count) is int for count in (cleaned.edits or {}).values())
        ):
            raise TypeError(
                f"the cleaning rule '{self.name}' returned {cleaned!r:.200}: return a Cleaned with"
                " the text, and integers in edits"
            )
        return cleaned
