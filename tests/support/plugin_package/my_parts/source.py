"""A source and a cleaning rule: chapters of files, of which short ones are dropped."""

from collections.abc import Iterator
from typing import ClassVar, Literal

from data_pipeline.cleaning.config import CleaningRule
from data_pipeline.cleaning.stage import Cleaned
from data_pipeline.sources.config import FilesBase
from data_pipeline.sources.files import list_files, whole_unit
from data_pipeline.sources.interface import Document, LeftOut, Source, Unit


class ChaptersSource(FilesBase):
    """Text files whose chapters are separated by empty lines; each chapter is a document."""

    implementation: ClassVar[str] = "my_parts.source:Chapters"
    reasons: ClassVar[dict[str, str]] = {"preface": "comes before the first chapter"}
    kind: Literal["chapters"]


class Chapters(Source[ChaptersSource]):
    """What the section stands for."""

    def units(self, unit_bytes: int) -> list[Unit]:
        """Each file is a unit, so that several workers have something to do."""
        return [whole_unit(self.context.name, path) for path in list_files(self.config.input)]

    def read(self, unit: Unit) -> Iterator[Document | LeftOut]:
        """Yield the chapters of a file, and what comes before the first one as left out."""
        with open(unit.files[0], encoding="utf-8") as stream:
            preface, *chapters = stream.read().split("\n\n")
        yield LeftOut(unit.files[0], "preface", is_bad=False, detail=preface)
        for number, chapter in enumerate(chapters):
            yield Document(chapter, f"{unit.files[0]}:{number}", file=unit.files[0])


class MinWords(CleaningRule):
    """Drops documents of less than ``words`` words."""

    implementation: ClassVar[str] = "my_parts.source:MinWordsFilter"
    kind: Literal["min_words"]
    words: int


class MinWordsFilter:
    """What the section stands for."""

    def __init__(self, config: MinWords) -> None:
        self.words = config.words

    def __call__(self, text: str) -> Cleaned:
        """Return the text, or the reason why it is dropped."""
        count = len(text.split())
        return Cleaned(text, "min_words" if count < self.words else None, f"{count} words")
